"""What is the same in one process and in several: all that a posterior is asked, and the layer posterior."""

from __future__ import annotations

from typing import Any

import torch
from processes.answers import SOLVERS
from processes.stage import BATCH, batches, data, loader, network, told

import nullbayes as nb


def same_by_layer() -> dict[str, Any]:
    """The layer posterior: sums, examples that are kept, certificate, scores, more data and less."""
    out: dict[str, Any] = {}
    wide: dict[str, Any] = {"memory": 10_000}  # layers are sketched
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "loader": (loader(23), {}),
        "exact": (loader(23), {"delta": 0}),
        "arrays": (data(301), {"prior_precision": 2.0}),
        "many": (loader(301), {}),
        "list": (batches(23), {}),
        "empty": (batches(BATCH + 1), {}),
        "sketched": (loader(23), wide),
        "float32": (loader(301, torch.float32), {}),
    }
    for name, (train, options) in cases.items():
        dtype = torch.float32 if name == "float32" else torch.float64
        p = nb.LayerNullSpacePosterior(network(dtype), **options).fit(train, 3, progress=False)
        out[name] = of_layers(p, dtype)
    noisy = nb.LayerNullSpacePosterior(network(), nb.Regression())
    x = data(23)[0]
    noisy.fit((x, x.sin()), 3, progress=False)
    out["regression"] = of_layers(noisy, torch.float64)
    out["regression"]["noise"] = torch.as_tensor(noisy.likelihood.noise_variance)  # type: ignore[attr-defined]
    p = nb.LayerNullSpacePosterior(network()).fit(loader(23), 3, progress=False)
    out["more"] = of_layers(p.update(loader(9, seed=3), progress=False), torch.float64)
    out["less"] = of_layers(p.remove(loader(9, seed=3), progress=False), torch.float64)
    fitted_on = batches(23)
    p.remove([tuple(t[:1] for t in fitted_on[0])], progress=False)  # less than there are processes
    out["one less"] = of_layers(p, torch.float64)
    # Once too often, and that in another process than the first time.
    kind, text = told(lambda: p.remove(fitted_on[2:3] * 2, progress=False))
    assert (kind, "not in this posterior" in text) == ("InputError", True)
    some = loader(31, seed=5)
    path = p.calibrate(some, ood_loader=[(3 * x, y) for x, y in batches(9)], progress=False)
    assert path.auroc is not None
    found = {"path": torch.tensor([path.nll, path.accuracy, path.auroc])}
    evaluation = p.evaluate(some, shifted={"far": batches(9, 7)}, progress=False).as_dict()
    found |= {key: evaluation[key] for key in ("figures", "detection", "thresholds")}
    out["asked"] = found | {"divergence": p.divergence(some), "precision": p.prior_precision}
    return out


def of_layers(p: nb.LayerNullSpacePosterior, dtype: torch.dtype) -> dict[str, Any]:
    c, gathered = p.certificate, p._fitted().gathered
    names = "divergence change left_out_divergence network_score posterior_score weight_change free_share"
    kept = torch.cat([inputs for inputs, _ in gathered.kept])
    some = data(5, dtype, 8)[0]
    return {
        **{name: getattr(c, name) for name in (*names.split(), "prior_precision")},
        "counts": (c.examples, c.checked_examples, [sums.count for sums in gathered.sums]),
        "kept": (kept, [len(inputs) for inputs, _ in gathered.kept]),
        "sample": torch.cat([t.flatten() for t in next(p.sample(1)).values()]),
        "mean": p.predict(some).mean,
        "scores": p.novelty(some),
        "members": gathered.members.counts.sum(),
    }


def same_of_a_posterior() -> dict[str, Any]:
    """Everything that a posterior can be asked about data."""
    out: dict[str, Any] = {}
    for name in ("dual", "primal"):
        p = nb.NullSpacePosterior(network(), solver=SOLVERS[name](1e-10), delta=1e-2)
        p.fit(loader(23), 4, progress=False)
        some = loader(31, seed=5)
        prediction = p.predict(some)
        found = {"mean": prediction.mean, "outputs": prediction.outputs}
        found |= {score: p.novelty(some, score=score) for score in ("information", "share")}
        found["one batch"] = p.novelty(data(5)[0])
        out[name] = found
        if name == "primal":
            continue
        found |= asked_of_data(p)
        p.draw(2)
        found["drawn"] = p._fitted().unit
        p.prior_precision = 3.0
        found["drift"] = torch.tensor([p.certificate.drift, p.certificate.posterior_score])
    return out


def asked_of_data(p: Any, exact: bool | None = None) -> dict[str, Any]:
    """What a posterior says of loaders: novelty, a choice, a calibration and an evaluation."""
    some, far = loader(31, seed=5), [(3 * x, y) for x, y in batches(9)]
    found: dict[str, Any] = {s: p.novelty(some, score=s, exact=exact) for s in ("share", "entropy")}
    found = {f"{score} of a loader": values for score, values in found.items()}
    for criterion in ("pool", "weights"):
        found[criterion] = p.select(some, 6, criterion=criterion)
    found["one to choose from"] = p.select(loader(1), 1)
    path = p.calibrate(some, ood_loader=far, progress=False)
    assert path.ece is not None
    assert path.auroc is not None
    found["path"] = torch.tensor([path.nll, path.accuracy, path.ece, path.auroc])
    evaluation = p.evaluate(
        some,
        shifted={"far": far},
        train=loader(23),
        validation=loader(9, seed=6),
        slices={"class 0": lambda inputs, targets: targets == 0},
        progress=False,
    )
    table = evaluation.as_dict()
    parts = ("figures", "differences", "train", "detection", "slices", "thresholds")
    return found | {key: table[key] for key in parts}
