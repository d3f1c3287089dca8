"""Groups of methods around one fine-tuned encoder; each returns its rows by key. Draws are on the processor."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from experiments.detection import published, rivals  # noqa: F401 - they enter their scores
from experiments.detection.base import SCORES
from experiments.devices import device
from experiments.language import encoder
from experiments.language.problem import Problem, Row, nll, parts, remembered, unit
from experiments.language.regime import Moved, regime
from experiments.methods.base import Draws, Tuned, joined, tune
from experiments.methods.peer_laplace import quiet, require_laplace
from experiments.methods.point import EIGHTHS, FINER
from experiments.methods.weights import Linearised, last_weights
from nullbayes.datasets import Split

PRIORS = tuple(float(k) for k in range(-2, 6))
# Decades of laplace-torch's prior precisions; the last is the network.
FROM_ONE = tuple(float(k) for k in range(9))
SHARE = 0.05
MEMORY = "12GB"
Rows = dict[str, Row]


def networks(problem: Problem) -> Rows:
    """The network alone, with a temperature, with its dropout left on, and several of them."""
    point = _of_networks([problem.network])
    several = _of_networks([problem.member(k) for k in range(problem.size.members)])
    dropped = _with_dropout(problem)
    count, what = problem.size.members, "adapters" if problem.way == "LoRA" else "networks"
    out: Rows = {}
    for key, title, own in (
        ("point", "network alone", point),
        ("dropout", "MC dropout", dropped),
        ("ensemble", f"{count} {what} †", several),
    ):
        draws = remembered(own)
        found = tempered(draws, problem.validation)
        heated = "temperature scaling" if key == "point" else f"{title}, temperature"
        out[key] = Row(title, draws)
        out[f"{key}_temperature"] = Row(
            heated, at_temperature(draws, found), {}, "temperature", found
        )
    return out


def _of_networks(members: Sequence[nn.Module]) -> Callable[[Tensor], Draws]:
    return lambda x: Draws(torch.stack([encoder.outputs(each, x) for each in members]))


def _with_dropout(problem: Problem) -> Callable[[Tensor], Draws]:
    """Gal, Ghahramani, ICML 2016: the same network, as it was trained."""
    network, where = copy.deepcopy(problem.network), device()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.train()

    def draws(x: Tensor) -> Draws:
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            torch.manual_seed(problem.seed)
            every = [encoder.outputs(network, x) for _ in range(problem.size.samples)]
        return Draws(torch.stack(every))

    return draws


def tempered(draws: Callable[[Tensor], Draws], validation: Split) -> float:
    """The temperature of least validation NLL."""
    found = draws(validation.inputs)

    def path(values: list[float]) -> list[float]:
        heated = [Draws(found.outputs, found.centre, {}, t) for t in values]
        return [nll(each, validation.targets) for each in heated]

    return tune(1.0, path, EIGHTHS, FINER).value


def at_temperature(
    draws: Callable[[Tensor], Draws], temperature: float
) -> Callable[[Tensor], Draws]:
    def heated(x: Tensor) -> Draws:
        found = draws(x)
        return Draws(found.outputs, found.centre, found.scores, temperature)

    return heated


# -- the library ---------------------------------------------------------------------------------


def novelty(posterior: Any) -> Callable[[Tensor], Tensor]:
    """The default score."""
    return lambda x: torch.cat([posterior.novelty(part).cpu() for part in parts(x)])


def linearised(posterior: Any, problem: Problem, key: str, title: str, declared: str) -> Rows:
    """By evidence; the prior precision, or a temperature, of least validation NLL."""
    alpha, validation = float(posterior.prior_precision), problem.validation
    last: list[Tensor] = []  # the texts asked for last, their outputs and changes

    def at(value: float) -> Callable[[Tensor], Draws]:
        def draws(x: Tensor) -> Draws:
            # The rows of one method are asked for the same texts, one after the other.
            if not last or last[0] is not x:
                last[:] = [x, *unit(posterior, x)]
            _, point, change = last
            return Draws(point + change * value**-0.5, point)

        return draws

    at(alpha)(validation.inputs)
    _, point, change = last

    def path(values: list[float]) -> list[float]:
        return [nll(Draws(point + change * a**-0.5, point), validation.targets) for a in values]

    best = tune(alpha, path)
    heat = tempered(at(alpha), validation)
    score = {declared: novelty(posterior)}
    by_evidence = f"{title}, by evidence"
    return {
        key: Row(by_evidence, at(alpha), score, "nothing", alpha, declared),
        f"{key}_tuned": Row(
            f"{title}, tuned", at(best.value), {}, "prior precision", best.value, "variance"
        ),
        f"{key}_temperature": Row(
            f"{title}, temperature", at_temperature(at(alpha), heat), {}, "temperature", heat,
            "variance",
        ),
    }  # fmt: skip


def null_space(problem: Problem) -> Rows:
    """Adapters and head on all texts; all weights of a fully tuned network on some."""
    if problem.way == "LoRA":
        return _null_space(problem, "null", "null space", problem.train, None)
    some = problem.train[: problem.size.preserved]
    return _null_space(problem, "null", f"null space, all weights, {len(some)} texts", some, None)


def last_twentieth(problem: Problem) -> Rows:
    """The last twentieth of a fully tuned network's weights, which leave room for all texts."""
    names = last_weights(problem.network, SHARE)
    return _null_space(problem, "null_part", "null space, last twentieth", problem.train, names)


def _null_space(
    problem: Problem, key: str, title: str, split: Split, names: list[str] | None
) -> Rows:
    posterior = nb.NullSpacePosterior(problem.network, parameters=names, memory=MEMORY)
    posterior.fit(problem.batches(split), problem.size.samples, problem.seed, progress=False)
    rows = linearised(posterior, problem, key, title, "novelty")
    certificate = posterior.certificate
    rows[key].details = {
        **{name: getattr(certificate, name) for name in CERTIFIED},
        "stages": dict(certificate.stages),
        "regime": regime(posterior, problem),
    }
    return rows


CERTIFIED = (
    "held", "verdict", "constraints", "parameters", "rank", "examples", "solver", "residual", "row_drift",
    "sampled_drift", "left_out_divergence", "prior_precision", "evidence", "network_score", "posterior_score",
    "seconds", "peak_memory",
)  # fmt: skip


def layers(problem: Problem) -> Rows:
    """Re-weighted networks, as fitted and with the prior precision of least validation NLL."""
    posterior = nb.LayerNullSpacePosterior(problem.network)
    posterior.fit(
        problem.batches(problem.train), problem.size.samples, problem.seed, progress=False
    )
    own, certificate = float(posterior.prior_precision), posterior.certificate
    networks = Moved(posterior)

    def at(value: float) -> Callable[[Tensor], Draws]:
        return lambda x: Draws(networks.outputs(x, value))

    def path(values: list[float]) -> list[float]:
        return [nll(at(a)(problem.validation.inputs), problem.validation.targets) for a in values]

    best = tune(own, path, PRIORS, ())
    details = {
        "held": certificate.held,
        "divergence": certificate.divergence,
        "left_out_divergence": certificate.left_out_divergence,
        "free_share": certificate.free_share,
        "fixed": sorted(certificate.fixed),
    }
    title, score = "layer null space", {"combined": novelty(posterior)}
    what = "prior precision"
    return {
        "layers": Row(f"{title}, as fitted", at(own), score, "nothing", own, "combined", details),
        "layers_tuned": Row(f"{title}, tuned", at(best.value), {}, what, best.value, "variance"),
    }


# -- Laplace -------------------------------------------------------------------------------------


def full_laplace(problem: Problem) -> Rows:
    """``nb.LaplacePosterior``: all adapters and the head, or the last twentieth of a fully tuned network."""
    names = None if problem.way == "LoRA" else last_weights(problem.network, SHARE)
    what = "adapters" if problem.way == "LoRA" else "last twentieth"
    posterior = nb.LaplacePosterior(problem.network, parameters=names, memory=MEMORY)
    posterior.fit(
        problem.batches(problem.train), problem.size.samples, problem.seed, progress=False
    )
    rows = linearised(posterior, problem, "laplace", f"full Laplace, {what}", "novelty")
    tuned = rows.pop("laplace_tuned")
    # Its samples belong to the evidence's prior; what a scale of them is called is tempering.
    tuned.title, tuned.tuned = f"full Laplace, {what}, tempered", "scale of the covariance"
    return {**rows, "laplace_tempered": tuned}


def last_layer(problem: Problem) -> Rows:
    """laplace-torch's, on the features: full GGN of the head, the prior precision of least validation NLL."""
    require_laplace()
    head, given = problem.given.head, problem.given
    train = Split(given.train_features, problem.train.targets)
    validation = given.features(problem.validation.inputs)
    with quiet():
        from laplace import Laplace
        from laplace.curvature import CurvlinopsGGN

        fitted = Laplace(
            copy.deepcopy(head), "classification", "all", "full", backend=CurvlinopsGGN
        )
        fitted.fit(train.loader(128))
    changes = _changing(fitted, problem)

    def at(alpha: float, z: Tensor) -> Draws:
        change = changes(alpha)
        weight, bias = change.split([head.weight.numel(), len(head.bias)], 1)
        moved = torch.einsum("sod,nd->sno", weight.unflatten(1, head.weight.shape), z)
        point = head(z).detach()
        return Draws(point + moved + bias[:, None], point)

    def path(values: list[float]) -> list[float]:
        return [nll(at(a, validation), problem.validation.targets) for a in values]

    best = tune(1.0, path, FROM_ONE)

    def draws(x: Tensor) -> Draws:
        return at(best.value, given.features(x))

    return {"laplace_last": _laplace_row("last-layer Laplace", draws, best)}


def kronecker(problem: Problem) -> Rows:
    """laplace-torch's Kronecker factors of all linear layers that move; predictions linearised in its weight draws."""
    require_laplace()
    network = copy.deepcopy(problem.network)
    linear = {
        f"{name}.{own}"
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        for own, _ in module.named_parameters(recurse=False)
    }
    for name, weight in network.named_parameters():
        weight.requires_grad_(weight.requires_grad and name in linear)
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    first = problem.train.inputs[:2].to(device())
    products = Linearised(problem.network, names, first)
    with quiet():
        from laplace import Laplace
        from laplace.curvature import CurvlinopsGGN

        fitted = Laplace(network, "classification", "all", "kron", backend=CurvlinopsGGN)
        fitted.fit(_Loader(problem.batches(problem.train), len(problem.train)))
    changes = _changing(fitted, problem)

    def at(alpha: float, x: Tensor) -> Draws:
        change = changes(alpha)
        found = []
        for part in parts(x):
            point, moved = products(change, part)
            found.append(Draws((point + moved).cpu(), point.cpu()))
        return joined(found)

    def path(values: list[float]) -> list[float]:
        found = [at(a, problem.validation.inputs) for a in values]
        return [nll(each, problem.validation.targets) for each in found]

    # Each value takes samples of all weights of its own: minutes of a processor.
    decades = FROM_ONE if problem.size.limit is None else FROM_ONE[::2]
    best = tune(1.0, path, decades, ())

    def draws(x: Tensor) -> Draws:
        return at(best.value, x)

    return {"laplace_kron": _laplace_row("Kronecker Laplace", draws, best)}


class _Loader(list[tuple[Tensor, Tensor]]):
    """Batches with the one thing of a loader's that laplace-torch asks for."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], count: int) -> None:
        super().__init__(batches)
        self.dataset = range(count)


def _changing(fitted: Any, problem: Problem) -> Callable[[float], Tensor]:
    """Weight draws less their mean ``(S, P)`` by prior precision: the same noise at each."""

    @functools.lru_cache(1)  # gigabytes each
    def changes(alpha: float) -> Tensor:
        with quiet():
            fitted.prior_precision = torch.tensor(alpha, device=fitted.mean.device)
            generator = torch.Generator(fitted.mean.device).manual_seed(problem.seed)
            drawn = fitted.sample(problem.size.samples, generator=generator)
            return (drawn - fitted.mean).detach()

    return changes


def _laplace_row(title: str, draws: Callable[[Tensor], Draws], best: Tuned) -> Row:
    return Row(title, draws, {}, "prior precision", best.value)


# -- scores --------------------------------------------------------------------------------------

#: In the order of the tables; of several settings the one that is best on the tuning sets is shown.
RIVALS = (
    "max-softmax", "energy", "GEN", "Mahalanobis", "relative Mahalanobis", "MDS++", "KNN, k=1", "KNN, k=10",
    "KNN, k=50", "ViM, half the directions", "ViM, a quarter", "DDU",
)  # fmt: skip


def features(problem: Problem) -> Rows:
    """Scores of the network's logits and features; and of the pretrained encoder's, and of the words alone."""
    out: Rows = {}
    for name in RIVALS:
        score = SCORES[name]()
        score.fit(problem.given)
        out[name] = Row(name, None, {name: score}, declared=name)
    before = encoder.build(len(problem.train.targets.unique()), problem.way, problem.seed)
    for name, title, embed in (
        ("pretrained", "nearest text, encoder before fine-tuning", encoder.features),
        ("words", "nearest text, its words", bag_of_words),
    ):
        nearest = _nearest(embed, before, problem.train.inputs)
        out[name] = Row(title, None, {name: nearest}, declared=name)
    return out


def bag_of_words(_: Any, tokens: Tensor) -> Tensor:
    """``(N, V)`` roots of counts of tokens, the marks at both ends left out."""
    settings, _state = encoder.pretrained()
    counts = torch.zeros(len(tokens), settings["vocab_size"])
    counts.scatter_add_(1, tokens, torch.ones(tokens.shape))
    counts[:, :103] = 0  # padding, marks of the tokenizer
    return counts.sqrt()


def _nearest(embed: Any, network: Any, train: Tensor) -> Callable[[Tensor], Tensor]:
    known = nn.functional.normalize(embed(network, train), dim=1)

    def score(x: Tensor) -> Tensor:
        own = nn.functional.normalize(embed(network, x), dim=1)
        return 1 - (own @ known.T).amax(1)

    return score


#: Of fully tuned networks alone.
IN_FULL = ("last twentieth",)
#: What takes the last twentieth of a fully tuned network's weights; left out on a processor.
PART = ("last twentieth", "Laplace")
#: What the small setting has.
SMALL = ("null space", "networks", "layers")
#: In the order in which they are measured.
GROUPS: dict[str, Callable[[Problem], Rows]] = {
    "null space": null_space,
    "features": features,
    "networks": networks,
    "last twentieth": last_twentieth,
    "last layer": last_layer,
    "layers": layers,
    "Laplace": full_laplace,
    "Kronecker": kronecker,
}
