"""An evaluation from its question to its figures: which passes are made, and what they are compared with."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nullbayes.common.processes import Processes
from nullbayes.common.progress import Stages, stages
from nullbayes.constraints.shared_rows import everyones
from nullbayes.errors import InputError
from nullbayes.metrics import roc_curve
from nullbayes.model.loader import batches
from nullbayes.model.shares import Share, shared
from nullbayes.model.undisturbed import undisturbed
from nullbayes.posterior.measuring.data import as_loader
from nullbayes.posterior.measuring.estimates import Estimate, auroc, fpr95, mean, threshold, verdict
from nullbayes.posterior.measuring.methods import (
    NETWORK,
    TEMPERATURE,
    Method,
    Source,
    other_sources,
    own_source,
)
from nullbayes.posterior.measuring.observing import CURVE_LEVELS, MOST_CLASSES, kind_of
from nullbayes.posterior.measuring.passing import NOVELTY, Pass, Passed
from nullbayes.posterior.measuring.records import Records
from nullbayes.posterior.measuring.showing import Show

if TYPE_CHECKING:
    from nullbayes.posterior.measuring.subject import Subject

RATES = (0.01, 0.05, 0.10)
SHOWN = 6  # inputs of each sort
_OF_THE_RUN = ("seconds", "stages", "peak_memory")
HISTOGRAM_BINS = 36
BASELINE = (NETWORK, "max_softmax")
#: classes with rows of their own
MOST_ROWS = 50


@dataclass(frozen=True)
class Question:
    """What `nullbayes.Posterior.evaluate` was asked; see there."""

    posterior: Subject
    test: Any
    shifted: Mapping[str, Any] | None
    train: Any
    validation: Any
    against: Sequence[Subject] | Mapping[str, Subject]
    slices: Mapping[str, Any] | None
    show: Show | None
    progress: bool
    processes: Processes | None = None


@dataclass
class Found:
    """Estimates, nested as the fields of `Evaluation` are."""

    figures: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    differences: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    detection: list[dict[str, Any]] = field(default_factory=list)
    train: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    thresholds: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def measured(question: Question) -> Found:
    """All passes and all figures.

    Raises:
        NotFittedError: no posterior yet. InputError: data, slices or posteriors that cannot be used.
    """
    posterior = question.posterior
    posterior._check_model()
    data = _loaders(question)
    _check_first(posterior, data)
    with stages(show=question.progress) as stage:
        sources = _sources(question, data.get("validation"))
        methods = [m for s in sources for m in s.methods]
        _check_keys(methods)
        main = sources[0].methods[-1].key
        some = question.processes
        test = Pass(sources, main, question.slices, SHOWN, some).labelled(
            data["test"], "test", stage
        )
        shifts = {
            name: Pass(sources, main, None, SHOWN, some).unlabelled(
                data[f"shifted[{name!r}]"], f"shifted[{name!r}]", stage
            )
            for name in question.shifted or {}
        }
        train = _train(Pass(sources, main, processes=some), data.get("train"), stage)
        ordinary = test
        if "validation" in data:
            ordinary = Pass(sources[:1], main, processes=some).unlabelled(
                data["validation"], "validation", stage
            )
    found = Found()
    _compare(found, test.records)
    found.train = {key: _trained(records) for key, records in train.items()}
    found.detection = _detection(methods, test, shifts)
    found.classes = _classes(test, posterior)
    found.slices = _slices(test)
    found.thresholds = _thresholds(main, ordinary, test, shifts)
    found.details = _details(question, sources, test, shifts)
    found.details["data"]["train"] = {"examples": max((len(r) for r in train.values()), default=0)}
    return found


def check_first(question: Question) -> None:
    """What can be said of the data of ``question`` before its posterior is fitted.

    Raises:
        InputError: data that cannot be read, or a first batch that the network or the likelihood does not take.
    """
    with undisturbed(question.posterior.functional.device):
        _check_first(question.posterior, _loaders(question))


# -- before the passes -----------------------------------------------------------------------------


def _loaders(question: Question) -> dict[str, Any]:
    """Every data set by the name that errors give it."""
    if question.shifted is not None and not isinstance(question.shifted, Mapping):
        raise InputError(
            f"`shifted` is {type(question.shifted).__name__}; expected {{name: data}}, e.g. "
            "shifted={'rotated': rotated_loader}."
        )
    if question.slices is not None and not isinstance(question.slices, Mapping):
        raise InputError(
            f"`slices` is {type(question.slices).__name__}; expected {{name: mask or function}}."
        )
    dtype = question.posterior.functional.dtype
    free = question.posterior.functional.layouts is not None
    out = {"test": as_loader(question.test, "test", dtype, labelled=not free)}
    for name in ("train", "validation"):
        value = getattr(question, name)
        if value is not None:
            out[name] = as_loader(value, name, dtype, labelled=not free)
    for key, value in (question.shifted or {}).items():
        name = f"shifted[{key!r}]"
        out[name] = as_loader(value, name, dtype, labelled=False)
    if question.processes is not None:
        out = {name: shared(loader, question.processes, name) for name, loader in out.items()}
    return out


def _check_first(posterior: Subject, data: Mapping[str, Any]) -> None:
    """The first batch of each set goes through the network, so that hours of work are not lost to the last set."""
    functional = posterior.functional
    free = functional.layouts is not None
    shape = None
    for name, loader in data.items():
        shifted = name.startswith("shifted")
        some = loader.probe if isinstance(loader, Share) else loader
        first = next(batches(some, functional, name, free=free or shifted))
        where = f"{name}, batch {first[0]}"
        outputs = functional.outputs(functional.keyed(first[1], [0]), where)
        if not shifted:
            posterior.likelihood.checked_targets(outputs, first[2], where)
        shape = outputs.ndim if shape is None else shape
        if outputs.ndim != shape:
            raise InputError(
                f"{where}: outputs of shape {tuple(outputs.shape)}, those of the test data have {shape} axes. Pass "
                "inputs of the kind that the network was trained on."
            )


def _sources(question: Question, validation: Any) -> list[Source]:
    posterior = question.posterior
    functional = posterior.functional

    def outputs() -> Iterator[tuple[Tensor, Any]]:
        return everyones(own_outputs(), validation)

    def own_outputs() -> Iterator[tuple[Tensor, Any]]:
        free = functional.layouts is not None
        for index, inputs, targets in batches(validation, functional, "validation", free=free):
            where = f"validation, batch {index}"
            point = functional.outputs(functional.keyed(inputs, [0]), where)
            yield point, posterior.likelihood.checked_targets(point, targets, where)

    others = other_sources(question.against)
    return [own_source(posterior, validation, outputs), *others]


def _check_keys(methods: Sequence[Method]) -> None:
    keys = [m.key for m in methods]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise InputError(f"`against` names two posteriors {twice}; give each a name of its own.")


def _train(walk: Pass, loader: Any, stage: Stages) -> dict[str, Records]:
    return {} if loader is None else walk.training(loader, "train", stage)


# -- figures ---------------------------------------------------------------------------------------


def _compare(found: Found, records: Mapping[str, Records]) -> None:
    for key, record in records.items():
        found.figures[key] = record.figures()
    reference = found.figures[NETWORK]
    for key, figures in found.figures.items():
        if key != NETWORK:
            found.differences[key] = {
                name: figure.minus(reference[name])
                for name, figure in figures.items()
                if name in reference
            }


def _trained(records: Records) -> dict[str, Estimate]:
    part = records.part()
    return {name: part[name] for name in (records.score_name, "nll")}


def _detection(
    methods: Sequence[Method], test: Passed, shifts: Mapping[str, Passed]
) -> list[dict[str, Any]]:
    """AUROC and FPR95 of every score that differs between inputs, against each shifted set."""
    if not shifts:
        return []
    baseline = {
        name: auroc(test.scores[BASELINE[0]][BASELINE[1]], passed.scores[BASELINE[0]][BASELINE[1]])
        for name, passed in shifts.items()
        if BASELINE[1] in test.scores[BASELINE[0]]
    }
    out = []
    for method in methods:
        for score, inside in sorted(test.scores[method.key].items(), key=_order):
            if not _tells(method, score):
                continue
            sets: dict[str, Any] = {}
            for name, passed in shifts.items():
                outside = passed.scores[method.key][score]
                area = auroc(inside, outside)
                sets[name] = {"auroc": area, "fpr95": fpr95(inside, outside)}
                if name in baseline and (method.key, score) != BASELINE:
                    difference = area.minus(baseline[name])
                    sets[name]["difference"] = difference
                    sets[name]["verdict"] = verdict(
                        difference.value, difference.error, higher_is_better=True, digits=3
                    )
            out.append({"method": method.key, "score": score, "sets": sets})
    return out


def _order(entry: tuple[str, Any]) -> int:
    order = ("max_softmax", "energy", NOVELTY, "entropy", "mutual_information")
    return order.index(entry[0]) if entry[0] in order else len(order)


def _tells(method: Method, score: str) -> bool:
    """The network has no epistemic part; a posterior's confidence and energy add nothing to its entropy."""
    if method.key == TEMPERATURE:
        return score == "max_softmax"  # the only one for which a temperature is commonly used
    if method.scale is None:
        return score in ("max_softmax", "energy", "entropy")
    return score not in ("max_softmax", "energy")


def _classes(test: Passed, posterior: Subject) -> dict[str, dict[str, Any]]:
    records = test.records
    groups, counts = records[NETWORK].group.unique(return_counts=True)
    kind = kind_of(posterior.likelihood)
    several = len(groups) > 1 and kind != "other" and len(groups) <= MOST_CLASSES
    if not several:
        return {}
    most = counts.argsort(descending=True, stable=True)[:MOST_ROWS].sort().values
    word = {"regression": "output", "binary": "label"}.get(kind, "class")
    if kind == "binary" and int(counts.sum()) == len(
        records[NETWORK]
    ):  # one logit: its two classes
        word = "class"
    return {
        f"{word} {int(groups[i])}": {
            "examples": int(counts[i]),
            "methods": {key: record.of_group(int(groups[i])) for key, record in records.items()},
        }
        for i in most.tolist()
    }


def _slices(test: Passed) -> dict[str, dict[str, Any]]:
    out = {}
    for name, mask in test.masks.items():
        parts = {key: record.where(mask).part() for key, record in test.records.items()}
        reference = parts[NETWORK]
        differences = {
            key: {n: e.minus(reference[n]) for n, e in part.items()}
            for key, part in parts.items()
            if key != NETWORK
        }
        out[name] = {"examples": int(mask.sum()), "methods": parts, "differences": differences}
    return out


def _thresholds(
    main: str, ordinary: Passed, test: Passed, shifts: Mapping[str, Passed]
) -> dict[str, Any]:
    scores = ordinary.scores[main][NOVELTY]
    rates = []
    for rate in RATES:
        found = threshold(scores, rate)
        entry: dict[str, Any] = {
            "rate": rate,
            "value": found.value,
            "low": found.low,
            "high": found.high,
        }
        if found.value is not None:
            entry["test"] = mean((test.scores[main][NOVELTY] > found.value).double())
            entry["shifted"] = {
                name: mean((passed.scores[main][NOVELTY] > found.value).double())
                for name, passed in shifts.items()
            }
        rates.append(entry)
    return {"from": ordinary.name, "examples": len(scores), "rates": rates}


# -- details ---------------------------------------------------------------------------------------


def _details(
    question: Question, sources: Sequence[Source], test: Passed, shifts: Mapping[str, Passed]
) -> dict[str, Any]:
    posterior, likelihood = question.posterior, question.posterior.likelihood
    main = sources[0].methods[-1].key
    keepers = {f"test: {sort}": keeper for sort, keeper in test.keepers.items()}
    keepers |= {name: passed.keepers["novel"] for name, passed in shifts.items()}
    certificate, path = posterior.certificate, sources[0].path
    audit = getattr(certificate, "audit", None)
    return {
        "task": kind_of(likelihood),
        "score_name": likelihood.score_name,
        "main": main,
        "methods": {
            m.key: {"title": m.title, "setting": m.setting, "posterior": m.scale is not None}
            for s in sources
            for m in s.methods
        },
        "data": {
            "test": {"examples": test.examples},
            "shifted": {name: {"examples": p.examples} for name, p in shifts.items()},
        },
        "curves": _curves(main, test, shifts),
        "examples": {name: keeper.shown(question.show) for name, keeper in keepers.items()},
        "units": {name: keeper.unit for name, keeper in keepers.items()},
        "certificate": _lasting(certificate.as_dict()),
        "audit": None if audit is None else audit.verdict,
        "calibration": None if path is None else path.as_dict(),
        "notes": [note for source in sources for note in source.notes],
        "settings": _settings(posterior),
        "environment": environment(),
    }


def _curves(main: str, test: Passed, shifts: Mapping[str, Passed]) -> dict[str, Any]:
    out: dict[str, Any] = {"reliability": {}, "risk_coverage": {}, "coverage": {}}
    for key, records in test.records.items():
        if records.answers is not None:
            out["reliability"][key] = records.answers.reliability()
            out["risk_coverage"][key] = records.answers.risk_coverage()
        if "coverage_90" in records.sums:
            count = float(records.count.sum())
            found = [
                float(records.sums[f"coverage_{100 * c:g}"].sum()) / count for c in CURVE_LEVELS
            ]
            out["coverage"][key] = {"level": list(CURVE_LEVELS), "found": found}
    inside = test.scores[main][NOVELTY]
    outside = {name: passed.scores[main][NOVELTY] for name, passed in shifts.items()}
    out["novelty"] = _histograms(inside, outside)
    pairs = {"novelty": (main, NOVELTY), "max_softmax": BASELINE, "energy": (NETWORK, "energy")}
    out["roc"] = {
        name: {
            label: roc_curve(test.scores[key][score], passed.scores[key][score])
            for label, (key, score) in pairs.items()
            if score in test.scores[key]
        }
        for name, passed in shifts.items()
    }
    return out


def _histograms(inside: Tensor, outside: Mapping[str, Tensor]) -> dict[str, Any]:
    """Counts of log10(novelty) on edges common to all."""
    smallest = 1e-9
    logs = {k: v.clamp_min(smallest).log10() for k, v in {"": inside, **outside}.items()}
    every = torch.cat(list(logs.values()))
    # Not `quantile`, which refuses more than 2^24 values.
    low, high = float(every.kthvalue(max(1, len(every) // 1000)).values), float(every.max())
    edges = torch.linspace(low, max(high, low + 1e-3), HISTOGRAM_BINS + 1, dtype=torch.float64)
    counts = {
        key: torch.histogram(value.clamp(low, float(edges[-1])), edges)[0].tolist()
        for key, value in logs.items()
    }
    return {"log10_edges": edges.tolist(), "inside": counts.pop(""), "outside": counts}


def _lasting(certificate: dict[str, Any]) -> dict[str, Any]:
    """Without what no second run would find again: one question, one file."""
    kept = {k: v for k, v in certificate.items() if k not in _OF_THE_RUN}
    if kept.get("audit") is not None:
        kept["audit"] = {k: v for k, v in kept["audit"].items() if k not in _OF_THE_RUN}
    return kept


def _settings(posterior: Subject) -> dict[str, Any]:
    about = posterior._described()
    return {
        "model": type(posterior.model).__name__,
        "weights": posterior.space.total,
        "posterior": type(posterior).__name__,
        "likelihood": repr(posterior.likelihood)[:200],
        "preserves": about["preserves"],
        "samples": posterior.num_samples,
        "seed": about["seed"],
        "prior precision": posterior.prior_precision,
        "predictive": about["predictive"],
    }


def environment() -> dict[str, Any]:
    """What the figures were made with. No date and no times: one question, one file."""
    try:
        ours = version("nullbayes")
    except PackageNotFoundError:  # a source tree that is not installed
        ours = "unknown"
    return {
        "nullbayes": ours,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
