"""The report: right figures, nothing from elsewhere, and honest words when a result is bad."""

import copy
import json
import re

import pytest
import torch
from pages import Reader

from nullbayes import metrics
from nullbayes.common.writing import plain, write_json, write_signed_json, write_text
from nullbayes.errors import InputError, MissingExtraError, StorageError
from nullbayes.report import headline, read_results, render_report, words, write_report

SHIFTS = {
    "held_out": {"title": "held-out classes", "words": "digits <3> & 7", "count": 40, "groups": []},
    "rotated": {
        "title": "rotated",
        "words": "turned",
        "count": 60,
        "groups": ["30°", "60°", "90°"],
    },
}


def method(title, sharpness, seed, prior):
    """Figures and curves of a made-up classifier, by the real metrics."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    probs, targets = logits.softmax(1), torch.randint(4, (200,), generator=generator)
    inside = torch.rand(200, generator=generator)
    outside = {key: torch.rand(s["count"], generator=generator) + 0.3 for key, s in SHIFTS.items()}
    ood = {key: metrics.ood_metrics(inside, scores) for key, scores in outside.items()}
    test = metrics.classification_metrics(probs, targets)
    edges = torch.linspace(-3, 1, 11)

    def counts(scores):
        return torch.histogram(scores.log10().clamp(-3, 1), edges)[0].tolist()

    figures = {
        "title": title,
        "score": "score",
        "train_accuracy": 0.9876,
        "train_nll": 0.1,
        "test_accuracy": test["accuracy"],
        **{key: test[key] for key in ("nll", "brier", "ece", "mce", "confidence")},
        "aurc": 0.1,
        "auroc": {key: value["auroc"] for key, value in ood.items()},
        "fpr95": {key: value["fpr95"] for key, value in ood.items()},
        "auroc_by_group": {"rotated": {"30°": 0.7, "60°": 0.8, "90°": 0.9}},
        "fit_seconds": 1.5,
        "prior_precision": prior,
    }
    curves = {
        "reliability": metrics.reliability_curve(probs, targets),
        "roc": {key: metrics.roc_curve(inside, scores) for key, scores in outside.items()},
        "histogram": {
            "log10_edges": edges.tolist(),
            "inside": counts(inside),
            "outside": {key: counts(scores) for key, scores in outside.items()},
        },
    }
    return figures, curves


# Figures of no run at all.
CERTIFICATE = {
    "residual": 4.2e-7,
    "drift": 3e-8,
    "sampled_drift": 0.01,
    "network_score": 0.9876,
    "posterior_score": 0.9876,
    "constraints": 3500,
    "parameters": 38152,
    "rank": 3400,
    "null_dim": 34752,
    "discarded_trace": 0.0,
    "solver": "dual Cholesky",
    "iterations": 2,
    "seconds": 3.25,
    "peak_memory": 512 * 2**20,
    "examples": 500,
    "held": True,
    "verdict": "The guarantee held <exactly>.",
}
PRIOR_PATH = {
    "prior_precision": [0.1, 1.0, 10.0, 100.0],
    "nll": [0.9, 0.5, 0.4, 0.6],
    "ece": [0.2, 0.1, 0.05, 0.08],
    "chosen": 2,
    "point": {"nll": 0.7, "ece": 0.09},
    "evidence": 3.0,
}


@pytest.fixture(scope="module")
def made_up():
    made = {
        "point": method("Point estimate", 2.0, 0, None),
        "null_space": method("Null-space posterior", 1.0, 1, 12.5),
        "laplace": method("Full Laplace", 1.0, 2, 3.0),
        "null_space_evidence": method("Null-space, by evidence", 1.2, 3, 20.0),
    }
    x = torch.linspace(-2, 2, 21)
    band = {
        "mean": x.tolist(),
        "sd": x.abs().tolist(),
        "draws": [x.tolist()],
        "train_sd": 1.2e-5,
        "gap_sd": 0.7,
    }
    results = {
        "schema": 2,
        "dataset": {
            "name": "digits",
            "title": "Made-up <b>digits</b>",
            "held_out": ["3", "7"],
            "trained_on": 500,
            "kept": 500,
            "validation": 300,
            "test": 200,
            "parameters": 38152,
            "shifts": SHIFTS,
        },
        "methods": {key: figures for key, (figures, _) in made.items()},
        "differences": {
            "null_space": {
                "train_accuracy": {"value": 0.0, "error": 0.0},
                "nll": {"value": -0.05, "error": 0.01},
                "ece": {"value": -0.003, "error": 0.01},
                "auroc": {"value": 0.02, "error": 0.02},
            }
        },
        "certificate": CERTIFICATE,
        "certificates": {"null_space": CERTIFICATE},
        "prior_path": {"null_space": PRIOR_PATH, "laplace": {**PRIOR_PATH, "evidence": 0.4}},
        "curves": {key: curves for key, (_, curves) in made.items()},
        "regression": {
            "train": {"x": [-1.0, 1.0], "y": [-1.0, 1.0]},
            "x": x.tolist(),
            "truth": x.tolist(),
            "point": {"mean": x.tolist()},
            "methods": {
                "null_space": {"title": "Null-space posterior", **band},
                "laplace": {"title": "Full Laplace", **band},
            },
        },
        "settings": {"dataset": "digits", "seed": 0, "note": "<script>alert(1)</script>"},
        "notes": ["Full Laplace: a note & more"],
        "seconds": {"total": 30.0, "training": 2.0},
        "environment": {"torch": "2.13.0", "date": "today"},
    }
    return json.loads(json.dumps(results))


@pytest.fixture
def results(made_up):
    return copy.deepcopy(made_up)


@pytest.fixture(scope="module")
def page(made_up):
    return render_report(made_up)


def test_the_page_is_whole_and_asks_for_nothing(page):
    reader = Reader(page)
    assert not reader.requests
    assert "://" not in page and "@import" not in page and "<script" not in page
    assert len(reader.ids) == len(set(reader.ids))
    assert set(reader.references) <= set(reader.ids)


def test_every_figure_has_a_text_alternative(page):
    assert page.count("<figure>") == page.count("<svg viewBox") == page.count('role="img"')
    labels = [label for label in Reader(page).labels if not label.startswith("Comparison")]
    assert len(labels) == page.count("<figure>") == 3 + 2 * len(SHIFTS) + 2 + 1 + 2
    assert all(len(label) > 20 and "nan" not in label for label in labels)


def test_the_page_works_on_a_phone_and_in_the_dark(page):
    assert 'name="viewport"' in page and "@media (max-width: 600px)" in page
    assert "prefers-color-scheme: dark" in page
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-fA-F]{6})", page))
    assert not colours, f"not taken from the page's variables: {colours}"


def test_the_page_holds_the_figures(page, results):
    text = " ".join("".join(Reader(page).text).split())
    for figures in results["methods"].values():
        assert figures["title"] in text
        for value in (figures["test_accuracy"], figures["nll"], figures["brier"], figures["ece"]):
            assert f"{value:.4f}" in text
        for value in figures["auroc"].values():
            assert f"{value:.3f}" in text
    for words_ in (
        "4.2 × 10⁻⁷",
        "38,152",
        "34,752",
        "512 MiB",
        "dual Cholesky",
        "held",
        "a note & more",
    ):
        assert words_ in text
    assert "The guarantee held <exactly>." in text


def test_text_from_the_results_is_escaped(page):
    assert "&lt;script&gt;" in page and "Made-up &lt;b&gt;" in page
    assert "digits &lt;3&gt; &amp; 7" in page


def test_the_same_results_give_the_same_bytes(page, results):
    assert render_report(results) == page


def test_headline_says_what_came_out(results):
    results["methods"]["point"].update(nll=0.619, ece=0.081, auroc={"a": 0.8, "b": 0.64})
    results["methods"]["null_space"].update(nll=0.584, ece=0.055, auroc={"a": 0.957, "b": 0.918})
    found = results["differences"]["null_space"]
    found["nll"], found["ece"] = {"value": -0.035, "error": 0.01}, {"value": -0.026, "error": 0.01}
    found["auroc"] = {"value": 0.22, "error": 0.01}
    assert headline(results) == (
        "Same training accuracy; NLL down from 0.619 to 0.584; ECE down from 0.081 to 0.055; "
        "out-of-distribution AUROC up from 0.72 to 0.94."
    )
    results["methods"]["null_space"].update(
        train_accuracy=0.9, nll=0.7, ece=0.081, auroc={"a": 0.5, "b": 0.5}
    )
    found["nll"], found["auroc"] = {"value": 0.08, "error": 0.01}, {"value": -0.2, "error": 0.01}
    assert headline(results) == (
        "Training accuracy fell from 0.9876 to 0.9000; NLL up from 0.619 to 0.700; ECE unchanged at 0.081; "
        "out-of-distribution AUROC down from 0.72 to 0.50."
    )


def test_the_headline_claims_no_difference_within_two_standard_errors(results):
    results["methods"]["point"].update(nll=0.123, ece=0.025)
    results["methods"]["null_space"].update(nll=0.111, ece=0.022)
    found = results["differences"]["null_space"]
    found["nll"], found["ece"] = {"value": -0.012, "error": 0.01}, {"value": -0.003, "error": None}
    said = headline(results)
    assert "NLL the same within its error (0.123, 0.111)" in said
    assert "ECE the same within its error (0.025, 0.022)" in said


def test_better_and_worse_are_said_beyond_two_standard_errors_only(results):
    assert [t["verdict"] for t in words.tiles(results)] == ["same", "better", "same", "same"]
    found = results["differences"]["null_space"]
    found["train_accuracy"] = {"value": -0.02, "error": 0.005}
    found["nll"] = {"value": 0.03, "error": 0.01}
    found["ece"] = {"value": -0.03, "error": None}  # not known
    found["auroc"] = {"value": 0.05, "error": 0.02}
    assert [t["verdict"] for t in words.tiles(results)] == ["worse", "worse", "same", "better"]


def test_a_weak_guarantee_is_not_dressed_up(results):
    results["certificate"].update(
        held=False, verdict="The guarantee is weak: the null space is empty."
    )
    page = render_report(results)
    assert '<span class="tag weak"' in page and '<span class="tag held"' not in page


def test_best_figures_are_marked_ties_too(results):
    for key, accuracy in zip(results["methods"], (0.9, 0.90001, 0.8, 0.7), strict=True):
        results["methods"][key]["test_accuracy"] = accuracy
        results["methods"][key]["nll"] = 1 - accuracy
    rows = words.table(results)["rows"]
    assert [row["cells"][1]["best"] for row in rows] == [True, True, False, False]
    assert [row["cells"][2]["best"] for row in rows] == [True, True, False, False]
    assert [row["minor"] for row in rows] == [False, False, False, True]


def test_what_takes_no_network_stands_beside_what_does(results):
    assert words.nearest_words(results) == ""  # of files that hold none of it
    assert "beside" not in words.tiles(results)[-1]
    areas = {key: 0.9 + 0.08 * n for n, key in enumerate(results["dataset"]["shifts"])}
    results["nearest_input"] = {"auroc": areas, "seconds": 0.25}
    mean = sum(areas.values()) / len(areas)
    assert headline(results).endswith(f" (nearest training image, no network: {mean:.2f}).")
    assert words.tiles(results)[-1]["beside"] == f"nearest image {mean:.3f}"
    said = words.nearest_words(results)
    assert all(f"{area:.3f}" in said for area in areas.values())
    assert "takes no network" in said
    row = words.table(results)["rows"][-1]
    assert [cell["text"] for cell in row["cells"][:5]] == ["–"] * 5
    assert [cell["text"] for cell in row["cells"][5:]] == [f"{a:.3f}" for a in areas.values()]
    assert row["seconds"] == "0.2"
    others = [m["auroc"] for m in results["methods"].values()]
    for cell, key in zip(row["cells"][5:], areas, strict=True):
        assert cell["best"] == (round(areas[key], 3) >= max(round(o[key], 3) for o in others))
    results["nearest_input"]["auroc"] = dict.fromkeys(areas, 0.8)
    assert "no network" not in words.nearest_words(results)
    assert "nearest image 0.800" in render_report(results)


def test_paths_that_end_at_the_point_estimate_or_lack_a_metric(results):
    path = results["prior_path"]["null_space"]
    path["prior_precision"][-1] = None  # infinite, as JSON has it
    path["chosen"] = 3
    results["prior_path"]["laplace"]["ece"] = None
    Reader(render_report(results))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0123, "0.0123"),
        (1.5e-7, "1.5 × 10⁻⁷"),
        (123456.0, "1.2 × 10⁵"),
        (-2e-9, "-2.0 × 10⁻⁹"),
    ],
)
def test_numbers_as_people_write_them(value, text):
    assert words.scientific(value) == text


def test_results_round_trip_and_report_is_written(results, tmp_path):
    write_signed_json(tmp_path / "results.json", results)
    again = read_results(tmp_path / "results.json")
    assert again == results
    path = write_report(again, tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("content", "words_"),
    [
        ("{", "not whole JSON"),
        ("[1]", "not a results file"),
        ('{"schema": 1}', "it lacks dataset"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words_):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StorageError, match=words_):
        read_results(path)


def test_results_of_another_layout_are_refused(results, tmp_path):
    write_json(tmp_path / "r.json", {**results, "schema": 99})
    with pytest.raises(StorageError, match="99"):
        read_results(tmp_path / "r.json")


def test_results_that_were_changed_are_refused(results, tmp_path):
    path = tmp_path / "r.json"
    write_signed_json(path, results)
    whole = path.read_text()
    for changed in (
        whole.replace('"schema": 2', '"schema": 3'),
        whole.replace('"checksum"', '"checkrum"'),
        whole.replace('"signed": true', '"signed": false'),
        whole.replace('"dataset"', '"datasot"', 1),
    ):
        assert changed != whole
        path.write_text(changed)
        with pytest.raises(StorageError, match="not what was written"):
            read_results(path)
    path.write_text("[" * 10**5)
    with pytest.raises(StorageError, match="not whole JSON"):
        read_results(path)
    write_json(path, results)  # as earlier versions wrote it
    assert read_results(path) == results


def test_results_that_cannot_be_drawn_are_refused(results, tmp_path):
    with pytest.raises(StorageError, match="lack, or hold as something else"):
        write_report({**results, "curves": 3}, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_json_has_no_nan():
    got = plain(
        {"a": float("nan"), 1: [torch.tensor(2.0), (torch.tensor([1, 2]), float("inf"))], "b": True}
    )
    assert got == {"a": None, "1": [2.0, [[1, 2], None]], "b": True}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_text(path, "old")

    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        write_text(tmp_path / "file" / "report.html", "")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("nullbayes.report.render.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"matplotlib and jinja2.*nullbayes\[report\]"):
        render_report({})


def test_the_audit_in_a_report() -> None:
    audit = {"passed": True, "examples": 16, "total": 1000, "batches": 8}
    fields = {"audit": words.CERTIFICATE_FIELDS["audit"]}
    rows = words.certificate_rows({"audit": audit}, fields)
    assert rows[0][:2] == ("Audit", "agrees: 16 of 1,000 examples, 8 batches")
    rows = words.certificate_rows({"audit": audit | {"passed": False}}, fields)
    assert rows[0][1].startswith("contradicts them")
    assert words.certificate_rows({"audit": None}, fields) == []
