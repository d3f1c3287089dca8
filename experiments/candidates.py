"""Scores of the layer posterior that were tried: all on tuning problems, the chosen one judged once beside the default.

The problems are those of the evaluation of the layer null space (:mod:`experiments.layers.problems`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nullbayes as nb
from experiments.detection.families import Problem, Size
from experiments.detection.posteriors import batched
from experiments.detection.rivals import MahalanobisNormalised
from experiments.detection.running import finite
from experiments.layers import tables as layer_tables
from experiments.layers.problems import JUDGING, TUNING, families
from experiments.measures import detection
from experiments.networks import identity
from experiments.runner import Job
from experiments.store import Key, collected
from experiments.tables import Column, Page, Row, at, provenances
from nullbayes.posterior.layer_combined import ENERGY_WEIGHT, LEAST, ONE_DEVIATION
from nullbayes.posterior.layer_fit import leverages
from nullbayes.posterior.layer_neighbours import Neighbours

NAME = "candidates"
TITLE = "Scores of the layer null space that were tried"
VERSION = 1
REFERENCES = 300
DEFAULT, CHOSEN = "combined", "neighbours"
TITLES = {
    "combined": "**default**, `combined`",
    "leverage": "`leverage`",
    "left out": "default, scales from examples that were left out of training",
    "directions": "default, directions of all layers in place of the last",
    "classes": "default, MDS++ of predicted classes in place of the last layer's direction",
    "last": "default, nearest training feature of length one in place of the last layer's direction",
    "neighbours": "**`neighbours`**, of 128 training examples",
    "every neighbour": "`neighbours` of all training examples",
}
WORDS = (
    "AUROC, mean over near and over far sets, ± standard error over problems and seeds. All of it with the networks, "
    "the sets and the small sizes of the evaluation of the layer null space. On the problems for tuning every form "
    "that was tried is shown; the one that was chosen there was then measured once on the judged problems, beside the "
    "default."
)


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """One piece for each problem and seed, those for tuning first; sizes and seeds never the full ones."""
    out = []
    size_of = "small" if setting == "small" else "processor"
    for wanted in (TUNING, JUDGING):
        for family in families(size_of).values():
            size = family.sizes[size_of]
            for member, role in family.chosen(size_of):
                for seed in seeds or range(family.seeds[size_of]):
                    if role != wanted or seed >= family.seeds[size_of]:
                        continue
                    key = Key(NAME, setting, seed, f"{family.name}, {member}")
                    config = {"size": size.config(), "version": VERSION, "role": role}
                    args = (family.name, member, role, seed, size)
                    out.append(Job(key, config, measure_job, args))
    return out


def measure_job(family: str, member: str, role: str, seed: int, size: Size) -> dict[str, Any]:
    """AUROC of each form on each set; of a judged problem those of the default and of the chosen one alone."""
    problem = families("processor")[family].make(member, seed, size)
    posterior = nb.LayerNullSpacePosterior(problem.given.network, problem.given.kind)
    posterior.fit(batched(problem.given.train), progress=False)

    def own(score: str) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([posterior.novelty(p, score=score) for p in x.split(100)])

    forms: dict[str, Callable[[Tensor], Tensor]] = {s: own(s) for s in (DEFAULT, CHOSEN)}
    if role == TUNING:
        forms["leverage"] = own("leverage")
        forms |= tried(posterior, problem)
    out: dict[str, Any] = {
        "family": family, "member": member, "role": role, "scores": {},
        "network": identity(problem.given.network), "accuracy": problem.accuracy,
    }  # fmt: skip
    for name, form in forms.items():
        known = finite(form(problem.test.inputs))
        out["scores"][name] = {
            distance: {key: detection(known, finite(form(x))) for key, x in sets.items()}
            for distance, sets in (("near", problem.near), ("far", problem.far))
        }
    return out


def tried(posterior: Any, problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """What was tried beside the library's own scores."""
    given, state = problem.given, posterior._fitted().state
    scorer = leverages(state)
    order = torch.randperm(len(given.train), generator=torch.Generator().manual_seed(0))
    some = given.train.inputs[order[:REFERENCES]]
    classes = _classes(problem)
    last = _NearestFeature(problem, order[:REFERENCES])

    def parts(x: Tensor) -> dict[str, Tensor]:
        found = [scorer.means(part) for part in x.split(100)]
        sizes, directions, outputs = (torch.cat(p) for p in zip(*found, strict=True))
        energy = posterior.likelihood.energy(outputs)
        out = {"sizes": sizes.clamp_min(1e-300).log(), "directions": directions.log()}
        reached = out["directions"].isfinite().any(0).nonzero().flatten()
        out["direction"] = out["directions"][:, reached[-1:]]
        out["energy"] = sizes[:, :0] if energy is None else energy.double().reshape(len(x), -1)
        out["classes"] = classes(x)[:, None].clamp_min(1e-300).log()
        out["last"] = last(x)[:, None].clamp_min(1e-12).log()
        return out

    own = parts(some)
    last.references = False
    scales = {"train": own, "left out": parts(given.reference[:REFERENCES])}

    def form(second: str, scale: str = "train") -> Callable[[Tensor], Tensor]:
        def score(x: Tensor) -> Tensor:
            found = parts(x)
            z = {key: _excess(found[key], scales[scale][key]) for key in found}
            total = z["sizes"].mean(1) + z[second].mean(1)
            return total + ENERGY_WEIGHT * z["energy"].sum(1)

        return score

    everyone = Neighbours(
        leverages(state, pooling=True),
        posterior.likelihood,
        [(part, None) for part in given.train.inputs.split(100)],
    )
    return {
        "left out": form("direction", "left out"),
        "directions": form("directions"),
        "classes": form("classes"),
        "last": form("last"),
        "every neighbour": lambda x: torch.cat([everyone.score(p) for p in x.split(100)]),
    }


def _excess(found: Tensor, known: Tensor) -> Tensor:
    """Deviations above the median of ``known``, squared; none below it."""
    if not known.shape[1]:
        return found
    centre = known.nanquantile(0.5, 0)
    spread = (known.nanquantile(ONE_DEVIATION, 0) - centre).clamp_min(LEAST)
    return ((found - centre) / spread).clamp_min(0).nan_to_num(0.0).square()


def _classes(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Mahalanobis distance of normalised features to the nearest mean of the classes as they are predicted."""
    given = problem.given
    y = torch.zeros(len(given.train), dtype=torch.long)
    if given.kind == "classification":
        y = given.logits(given.train.inputs).argmax(1)
    score = MahalanobisNormalised()
    score.fit(replace(given, train=replace(given.train, targets=y)))
    return score


class _NearestFeature:
    """Distance of features of length one to the nearest of the training data; of ``own`` examples to another one."""

    def __init__(self, problem: Problem, own: Tensor) -> None:
        self.given, self.own, self.references = problem.given, own, True
        self.known = self._unit(problem.given.train_features)

    @staticmethod
    def _unit(features: Tensor) -> Tensor:
        z = features.double()
        return z / z.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def __call__(self, x: Tensor) -> Tensor:
        apart = torch.cdist(self._unit(self.given.features(x)), self.known)
        if self.references:
            apart[torch.arange(len(x)), self.own] = torch.inf
        return apart.amin(1)


# -- from runs to tables ---------------------------------------------------------------------------


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    """``candidates.md`` and ``.json``; nothing where there are no runs."""
    if not runs:
        return
    page = Page(NAME, f"{TITLE} ({setting})")
    page.say(WORDS, provenances(runs, f"python -m experiments {NAME} --setting {setting}"))
    results = [run["result"] for run in runs]
    for role, words in ((TUNING, "Tuning problems"), (JUDGING, "Judged problems")):
        mine = [r for r in results if r["role"] == role]
        if mine:
            for distance in ("near", "far"):
                page.table(f"{words}: {distance} sets", *table(mine, distance), "", "score")
    layers = collected(setting, "layers", folder.parent)
    if layers and any(r["role"] == JUDGING for r in results):
        page.table("Against all scores of one network", *against(runs, layers), AGAINST, "family")
    page.write(folder, runs)


AGAINST = (
    "Judged problems: ours less the best score of one network on these sets (whose name follows), paired over problems "
    "and seeds; bold: better, or within one standard error. *Counted*: without the sets that the nearest input solves; "
    "– where these are all. The others are those of the evaluation of the layer null space."
)


def against(
    runs: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]]
) -> tuple[list[Row], list[Column]]:
    """Default and chosen form in the place of the layer null space among its rivals; a row a family."""
    judged = {
        (r["result"]["family"], r["result"]["member"], r["seed"]): r["result"]["scores"]
        for r in runs
        if r["result"]["role"] == JUDGING
    }
    rows: dict[str, dict[str, str]] = {}
    for form in (DEFAULT, CHOSEN):
        found = layer_tables.Found(layers)
        for key, problem in found.problems.items():
            own = {"combined": judged[key][form]} if key in judged else {}
            problem["rows"][layer_tables.LAYERS] = {"scores": own}
        for name in found.names:
            for what in ("near", "far", "near counted", "far counted"):
                measure = layer_tables.Measure(
                    what, "", dict.fromkeys(layer_tables.BOTH, (what, 1))
                )
                cell = layer_tables.compared(found, name, measure, layer_tables.LAYERS)
                rows.setdefault(name, {})[f"`{form}`, {what}"] = cell
    titles = list(next(iter(rows.values())))
    return [Row(n, [cells]) for n, cells in rows.items()], [Column(t, at(t)) for t in titles]


def mean_of(scores: dict[str, Any], distance: str) -> float:
    return statistics.fmean(found["auroc"] for found in scores[distance].values())


def table(results: Sequence[dict[str, Any]], distance: str) -> tuple[list[Row], list[Column]]:
    """A row a form, a column a family, and the mean over families."""
    names = list(dict.fromkeys(r["family"] for r in results))
    rows = []
    for name, title in TITLES.items():
        found = [
            {r["family"]: mean_of(r["scores"][name], distance)}
            for r in results
            if name in r["scores"]
        ]
        if found:
            values = [statistics.fmean(f[n] for f in found if n in f) for n in names]
            rows.append(Row(title, [*found, {"mean": statistics.fmean(values)}]))
    return rows, [Column(n, at(n), 1, 3) for n in (*names, "mean")]
