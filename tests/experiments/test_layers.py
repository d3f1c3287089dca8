"""The table of the layer null space: choices from tuning problems alone, figures against figures by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from experiments import candidates
from experiments.detection.base import Given
from experiments.detection.families import JUDGING, TUNING, Problem, Size
from experiments.layers import running, sequences, tables
from experiments.layers.problems import families
from experiments.methods import Draws
from nullbayes.datasets import Split


def row(near: float, far: float, quality: dict[str, float] | None = None, **more: Any) -> Any:
    scores = {
        name: {"near": {"a": {"auroc": near + off}}, "far": {"b": {"auroc": far + off}}}
        for name, off in (("one", 0.0), ("two", 0.05))
    }
    out = {
        "title": "",
        "declared": "",
        "scores": scores,
        "fit_seconds": 1.0,
        "seconds_per_1000": 1.0,
    }
    return {**out, **({"quality": quality} if quality else {}), **more}


def run(role: str, rows: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    result = {
        "family": "tables", "member": role, "role": role, "kind": "classification", "rows": rows,
        "train": 10, "parameters": 5,
    }  # fmt: skip
    return {"seed": seed, "result": result}


def test_counted_sets_are_those_that_the_nearest_input_does_not_solve() -> None:
    """By hand: of two far sets the nearest input solves one; both near sets are solved, so nothing counts there."""

    def scored(name: str, near: list[float], far: list[float]) -> Any:
        sets = {
            "near": dict(zip("ab", near, strict=True)),
            "far": dict(zip("cd", far, strict=True)),
        }
        both = {d: {n: {"auroc": v} for n, v in found.items()} for d, found in sets.items()}
        return row(0.5, 0.5) | {"scores": {name: both}}

    rows = {
        "nearest input": scored("nearest input", [0.98, 0.99], [0.98, 0.6]),
        "layers": scored("combined", [0.9, 0.9], [1.0, 0.7]),
        "DDU": scored("DDU", [0.5, 0.5], [0.6, 0.8]),
    }
    found = tables.Found([run(role, rows) for role in (TUNING, JUDGING)])
    cells, near, far = {}, *tables.COUNTED
    for measure in (*tables.MEASURES[-2:], near, far):
        cells[measure.title] = tables.compared(found, "tables", measure, "layers")
    assert cells["AUROC, near sets"] == "**+0.400** (DDU)"
    assert cells["AUROC, far sets"] == "**+0.150** (DDU)"
    assert cells["near counted"] == "–" and cells["far counted"] == "-0.100 (DDU)"


def test_scores_and_settings_come_from_the_tuning_problems() -> None:
    found = tables.Found(
        [
            run(TUNING, {"KNN, k=1": row(0.6, 0.6), "KNN, k=10": row(0.7, 0.7)}),
            run(JUDGING, {"KNN, k=1": row(0.9, 0.9), "KNN, k=10": row(0.5, 0.5)}),
        ]
    )
    assert found.chosen("KNN", "classification") == ("KNN, k=10", "two")
    value = found.value("KNN", "near", "classification")(found.of("tables")[0])
    assert value == pytest.approx(0.55)
    assert found.chosen("layers, leverage", "classification") == ("layers", "leverage")


def test_where_it_loses_is_paired_and_names_the_best() -> None:
    runs = []
    for seed, (ours, rival) in enumerate(((0.3, 0.2), (0.5, 0.3))):
        figures = {"nll": ours, "joint_nll": 1.0, "accuracy": 1.0, "ece": 0.1}
        rows = {
            "layers": row(0.9, 0.9, figures, declared="combined"),
            "laplace_diag": row(0.8, 0.8, {**figures, "nll": rival}),
            "temperature": row(0.8, 0.8, {**figures, "nll": 0.4}),
            "ensemble_tuned": row(0.8, 0.8, {**figures, "nll": 0.0}),
        }
        runs.append(run(JUDGING, rows, seed))
    found = tables.Found(runs)
    nll = next(m for m in tables.MEASURES if m.title == "NLL")
    text = tables.compared(found, "tables", nll, "layers")
    assert text == "-0.150 ± 0.050 (diagonal Laplace)"  # five networks are no rival of one
    runs[0]["result"]["rows"]["layers"]["quality"]["nll"] = 0.1
    assert tables.compared(tables.Found(runs), "tables", nll, "layers").startswith(
        "**-0.050 ± 0.150**"
    )


def test_a_method_that_failed_is_a_dash_with_its_reason() -> None:
    rows = {
        "laplace_kron": {"title": "laplace_kron", "error": "KeyError: 'out_proj'"},
        "x": row(0.5, 0.5),
    }
    found = tables.Found([run(JUDGING, rows)])
    assert found.value("laplace_kron", "nll", "classification")(found.of("tables")[0]) is None
    assert tables.failed(found) == ["Kronecker Laplace: 'out_proj' (tables)"]


def test_joint_figures_by_hand() -> None:
    """A regression with two draws: log densities of a Gaussian around each."""
    network = nn.Linear(1, 1).double().eval()
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    split = Split(x, x.clone())
    given = Given(network, split, x, 4, "regression")
    case = running.case_of(Problem(given, split, {}, {}, None, split), Size())
    assert case.noise is not None
    assert case.noise == pytest.approx(float((network(x).detach() - x).square().mean()))
    outputs = torch.stack([x + 0.1, x - 0.2])
    found = running.quality(case, Draws(outputs), split)
    constant = math.log(2 * math.pi * case.noise)
    logs = torch.tensor([-0.5 * (g**2 / case.noise + constant) for g in (0.1, 0.2)])
    # All gaps of a draw are alike, so every group of ten has the same likelihood under it.
    wanted = -float((10 * logs).logsumexp(0) - math.log(2))
    assert found["joint_nll"] == pytest.approx(wanted, rel=1e-6)
    assert found["rmse"] == pytest.approx(0.05, rel=1e-9)


def test_every_task_has_its_problems_and_three_are_new() -> None:
    known = families("processor")
    assert {
        "digits",
        "fashion_lenet",
        "fashion_resnet",
        "swin",
        "tabular",
        "clothes",
        "tables",
        "gaps",
    } < set(known)
    assert {name for name, f in known.items() if "**new**" in f.words} == {
        "texts",
        "voices",
        "leaves",
    }
    for family in known.values():
        for setting in ("processor", "full"):
            assert any(role == JUDGING for _, role in family.chosen(setting))
        assert all(set(some) <= set(family.members) for some in family.some.values())
        assert max(family.seeds.values()) >= 3


def test_words_are_numbers_and_padding_is_told_from_words() -> None:
    index = {"a": 2, "b": 3}
    x = sequences._encoded(index, ["a b c", "b"])
    assert x.shape == (2, sequences.LENGTH) and x.dtype == torch.float32
    assert x[0, :4].tolist() == [2, 3, 1, 0]
    model = sequences.Encoder(3).eval()
    alone = model(x[1:])
    torch.testing.assert_close(model(x)[1:], alone)
    moved = x.clone()
    moved[1, 0] = 2.0
    assert (model(moved)[1] - model(x)[1]).abs().max() > 1e-4


def test_forms_of_the_score_are_compared_with_the_rivals_of_the_layer_null_space() -> None:
    """Each form stands in the place of the layer posterior; a family of which it has no figures is a dash."""

    def sets(value: float) -> Any:
        return {"near": {"a": {"auroc": value}}, "far": {"b": {"auroc": value}}}

    rivals = {"layers": row(0.1, 0.1), "DDU": row(0.5, 0.5) | {"scores": {"DDU": sets(0.7)}}}
    layers = [run(role, rivals) for role in (TUNING, JUDGING)]
    scores = {"combined": sets(0.6), "neighbours": sets(0.9)}
    judged = {"family": "tables", "member": JUDGING, "role": JUDGING, "scores": scores}
    rows, columns = candidates.against([{"seed": 0, "result": judged}], layers)
    (cells,) = rows[0].runs
    assert rows[0].title == "tables" and len(columns) == 8
    assert cells["`combined`, near"] == "-0.100 (DDU)"
    assert cells["`neighbours`, far counted"] == "**+0.200** (DDU)"
    rows, _ = candidates.against([], layers)
    assert set(rows[0].runs[0].values()) == {"–"}
