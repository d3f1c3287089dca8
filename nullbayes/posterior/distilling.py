"""Fitting a distilled module to its posterior, and measuring how closely it follows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nullbayes.errors import FidelityError, InputError, ModelError, NonFiniteError
from nullbayes.metrics import ood_metrics
from nullbayes.model.batch import Inputs, batch_size, plain, take
from nullbayes.posterior.corruptions import JUDGING, corrupted, teaching
from nullbayes.posterior.distilled import Distilled, Seen, tap
from nullbayes.posterior.heads import Head, KernelHead, rank_correlation
from nullbayes.posterior.predicting import scores_of

if TYPE_CHECKING:
    from nullbayes.posterior.base import Posterior

#: what a module has to reach: rank correlation with the posterior over all that it is judged on, and AUROC lost
LEAST_CORRELATION, MOST_AUROC_LOST = 0.8, 0.05
# By how much less novelty of ordinary inputs alone, which differ less, may be correlated.
ORDINARY_LESS = 0.3
# Of the examples, how many judge; and how few do not.
JUDGES, FEWEST = 4, 40
# Layers whose inputs the head looks at: the last ones with inputs of their own, and how many of them may be maps, of
# which a second one brought little. Of layers that receive tokens it looks at the first: which tokens there are is what
# is new of a text.
TAPS, MAPS = 3, 1
TAPPED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ORDINARY, ALL = "ordinary", "all"


@dataclass(frozen=True)
class Asked:
    """Arguments of `nullbayes.Posterior.distil`."""

    shifted: Mapping[str, Any] = field(default_factory=dict)
    max_examples: int = 2000
    seed: int = 0
    least_correlation: float = LEAST_CORRELATION
    most_auroc_lost: float = MOST_AUROC_LOST


@dataclass(frozen=True)
class Fidelity:
    """How closely a distilled module follows its posterior, on examples that it was not fitted to.

    Attributes:
        examples: ordinary ones that it was judged on; ``fitted``: examples and shifted copies that it was fitted to.
        correlation: rank correlation (Spearman) of its novelty with the posterior's: ``"ordinary"``, each shift,
            ``"all"`` of them together.
        variance_correlation: the same of its variance, over all.
        auroc: ``{shift: (posterior, module)}``, how well novelty tells that shift from ordinary inputs.
        least_correlation, most_auroc_lost: what was asked for.
    """

    examples: int
    fitted: int
    correlation: dict[str, float]
    variance_correlation: float
    auroc: dict[str, tuple[float, float]]
    least_correlation: float = LEAST_CORRELATION
    most_auroc_lost: float = MOST_AUROC_LOST

    @property
    def auroc_lost(self) -> float:
        """The largest loss of AUROC over the shifts; negative where the module is better on all."""
        return max(before - after for before, after in self.auroc.values())

    @property
    def faithful(self) -> bool:
        """Whether it is as close as was asked for."""
        close = self.correlation[ALL] >= self.least_correlation
        close &= self.correlation[ORDINARY] >= self.least_correlation - ORDINARY_LESS
        return close and self.auroc_lost <= self.most_auroc_lost

    def __str__(self) -> str:
        each = ", ".join(f"{name} {value:.2f}" for name, value in self.correlation.items())
        lost = ", ".join(f"{n} {a:.3f} → {b:.3f}" for n, (a, b) in self.auroc.items())
        return (
            f"rank correlation with the posterior's novelty on {self.examples} other examples: {each} (variance "
            f"{self.variance_correlation:.2f}); AUROC, posterior → module: {lost}"
        )


@dataclass(frozen=True)
class _Scored:
    """Batches with the posterior's scores: ``novelty`` and ``variance (N,)``."""

    batches: list[Inputs]
    scores: Tensor  # (N, 2) float64

    @staticmethod
    def of(posterior: Posterior, batches: list[Inputs]) -> _Scored:
        parts = [scores_of(posterior, posterior._inputs(x, None)) for x in batches]
        scores = torch.cat(parts).double().cpu()
        if not bool(scores.isfinite().all()):
            raise NonFiniteError("the posterior's novelty of an input is NaN or infinite.")
        return _Scored(batches, scores)


def distilled(posterior: Posterior, batches: Iterator[Inputs], asked: Asked) -> Distilled:
    """See `nullbayes.Posterior.distil`."""
    functional = posterior.functional
    if functional.randomness is not None or functional.layouts is not None:
        raise InputError(
            "a distilled module needs a network without random numbers whose output is one tensor; use "
            "`posterior.novelty` for this one."
        )
    generator = torch.Generator().manual_seed(asked.seed)
    fitting, judging = _divided(posterior, batches, asked.max_examples)
    module = _module(posterior, fitting[0])
    taught = _Scored.of(posterior, [*fitting, *_shifted(fitting, generator)])
    floor = taught.scores.amax(0).clamp_min(1e-300) * 1e-12
    with torch.no_grad():
        found = [module.features(plain(x))[1] for x in taught.batches]
        features = [torch.cat(parts) for parts in zip(*found, strict=True)]
        targets = torch.maximum(taught.scores, floor).log().to(features[0].device)
        kind = KernelHead if module.reads_tokens else Head
        module.head = kind(features, targets, generator)
    module = module.to(functional.device).eval().requires_grad_(requires_grad=False)
    _check_alone(posterior, module, judging[0])
    module.fidelity = fidelity = _judged(posterior, module, judging, asked, generator, taught)
    if not fidelity.faithful:
        raise FidelityError(
            f"the distilled module does not follow its posterior: {fidelity}. Asked for are a correlation of "
            f"{asked.least_correlation} over all, {ORDINARY_LESS} less on ordinary examples, and at most "
            f"{asked.most_auroc_lost} of AUROC lost. Give more data, or lower `least_correlation` or raise "
            "`most_auroc_lost`; or score with `posterior.novelty`.",
            fidelity,
        )
    return module


def _shifted(fitting: list[Inputs], generator: torch.Generator) -> Iterator[Inputs]:
    """For each of the ways that teach, copies of every other example, shifted so."""
    for number, kind in enumerate(teaching(fitting[0])):
        for x in fitting:
            size = batch_size(x)
            half = (size + 1) // 2
            first = number % 2 == 0 or size == 1
            some = take(x, 0, half, size) if first else take(x, half, size, size)
            yield corrupted(plain(some), kind, generator)


def _divided(
    posterior: Posterior, batches: Iterator[Inputs], most: int
) -> tuple[list[Inputs], list[Inputs]]:
    """Batches to fit to, and others to judge by: the last of each batch, so that both are of the same kind."""
    fitting: list[Inputs] = []
    judging: list[Inputs] = []
    held = total = 0
    for x in batches:
        x = posterior._inputs(x, None)
        size = min(batch_size(x), most - total)
        total += size
        judges = (total // JUDGES) - held
        held += judges
        if size > judges:
            fitting.append(plain(take(x, 0, size - judges)))
        if judges:
            judging.append(plain(take(x, size - judges, size)))
        if total >= most:
            break
    if total < FEWEST:
        raise InputError(
            f"`loader` holds {total} examples; a module is fitted to three quarters of them and judged by the rest, "
            f"which takes {FEWEST} at least, and some hundreds to be of use."
        )
    return fitting, judging


def _module(posterior: Posterior, x: Inputs) -> Distilled:
    """The network's copy with taps in its last layers that receive something for each example."""
    functional = posterior.functional
    functional.batch(
        x
    )  # of a posterior from a file: which precision it computes in is found out here
    try:
        network = copy.deepcopy(posterior.model)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied ({type(error).__name__}: {error}), which a distilled module is; drop tensors "
            "that belong to a graph from its attributes."
        ) from error
    wide = functional.widened
    network = network if wide is None else network.to(wide)
    seen = Seen()
    module = Distilled(network, seen, posterior.likelihood, functional.user_forward)
    module.reads_as(functional)
    tapped, module.reads_tokens = _tapped(module, x)
    module.taps = len(tapped)
    for path in tapped:
        if not path:
            module.network = tap(network, seen)
        else:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, tap(network.get_submodule(path), seen))
    return module


VECTOR, MAP, TOKENS, NEITHER = "vector", "map", "tokens", ""


def _tapped(module: Distilled, x: Inputs) -> tuple[list[str], bool]:
    """Paths of the layers to look at, as they are called, and whether one of them receives tokens.

    Each is called once, with the batch on the first axis.

    Of several that receive the same tensor (a block and the shortcut around it), the first one.
    """
    size, calls, before = batch_size(x), list[tuple[str, str]](), list[Tensor]()
    hooks = []
    for path, layer in module.network.named_modules():
        if isinstance(layer, TAPPED):

            def hook(layer: nn.Module, args: Any, path: str = path) -> None:
                given = args[0] if args and isinstance(args[0], Tensor) else None
                calls.append((path, _kind(layer, given, size, before)))
                before.extend([given] if given is not None else [])

            hooks.append(layer.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            module.features(plain(x))
    finally:
        for handle in hooks:
            handle.remove()
    paths = [path for path, _ in calls]
    able = [(path, kind) for path, kind in calls if kind and paths.count(path) == 1]
    if not able:
        raise ModelError(
            "no linear or convolution layer of the network receives one vector, image or text for each example, which "
            "the head of a distilled module looks at; score with `posterior.novelty`."
        )
    tokens = [path for path, kind in able if kind == TOKENS][:1]
    room, chosen = {VECTOR: TAPS, MAP: MAPS, TOKENS: 0}, set(tokens)
    for path, kind in reversed(able):
        if room[kind] and len(chosen) < TAPS + len(tokens):
            room[kind] -= 1
            chosen.add(path)
    return [path for path in paths if path in chosen], bool(tokens)


def _kind(layer: nn.Module, given: Tensor | None, size: int, before: list[Tensor]) -> str:
    """What a layer receives for each example, where no earlier one received the same tensor."""
    if given is None or len(given) != size or any(given is other for other in before):
        return NEITHER
    if not isinstance(layer, nn.Linear):
        return MAP
    return {2: VECTOR, 3: TOKENS}.get(given.ndim, NEITHER)


def _scores(module: Distilled, batches: list[Inputs]) -> Tensor:
    """The module's ``(N, 2)`` float64."""
    parts = []
    with torch.no_grad():
        for x in batches:
            given = plain(x)
            if isinstance(given, tuple):
                found = module(*given)
            else:
                found = module(**given) if isinstance(given, Mapping) else module(given)
            parts.append(torch.stack(found[1:], 1))
    return torch.cat(parts).double().cpu()


def _check_alone(posterior: Posterior, module: Distilled, x: Inputs) -> None:
    """Raise `ModelError` unless an example alone scores as among others, and outputs are the network's."""
    size = min(3, batch_size(x))
    some = take(x, 0, size)
    together = _scores(module, [plain(some)])
    alone = _scores(module, [plain(take(some, i, i + 1, size)) for i in range(size)])
    given = plain(some)
    with torch.no_grad():
        outputs = module.features(given)[0]
    wanted = posterior.functional.outputs(some)
    right = torch.allclose(outputs, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    if not right or not torch.allclose(alone, together, rtol=0.02):
        raise ModelError(
            "the distilled module gives an example other scores alone than among others, or other outputs than the "
            "network. Does `forward=`, or a layer, reach the model other than by its argument?"
        )


def _judged(
    posterior: Posterior,
    module: Distilled,
    judging: list[Inputs],
    asked: Asked,
    generator: torch.Generator,
    taught: _Scored,
) -> Fidelity:
    sets = {ORDINARY: judging}
    sets |= {kind: [corrupted(x, kind, generator) for x in judging] for kind in JUDGING}
    sets |= {name: list(x) for name, x in asked.shifted.items()}
    theirs = {name: _Scored.of(posterior, some).scores for name, some in sets.items()}
    ours = {name: _scores(module, some) for name, some in sets.items()}
    correlation = {n: rank_correlation(ours[n][:, 0], theirs[n][:, 0]) for n in sets}
    together = [torch.cat([scores[n] for n in sets]) for scores in (ours, theirs)]
    correlation[ALL] = rank_correlation(together[0][:, 0], together[1][:, 0])

    def auroc(scores: dict[str, Tensor], name: str) -> float:
        return ood_metrics(scores[ORDINARY][:, 0], scores[name][:, 0])["auroc"]

    return Fidelity(
        len(ours[ORDINARY]),
        len(taught.scores),
        correlation,
        rank_correlation(together[0][:, 1], together[1][:, 1]),
        {n: (auroc(theirs, n), auroc(ours, n)) for n in sets if n != ORDINARY},
        asked.least_correlation,
        asked.most_auroc_lost,
    )
