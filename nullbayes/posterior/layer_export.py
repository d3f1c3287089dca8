"""A layer posterior as one plain module: outputs, predictions and leverages, for `torch.export` and ONNX."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from nullbayes.errors import InputError, ModelError, NullBayesError
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, batch_size, plain, take
from nullbayes.model.functional import Forward
from nullbayes.moments.factor import Edge
from nullbayes.moments.traced import Call, Done, Merged, Put, Tape, means, probes_of, scores
from nullbayes.moments.watched import watched
from nullbayes.posterior.exported import Exported
from nullbayes.posterior.layer_combined import ENERGY_WEIGHT, References
from nullbayes.posterior.layer_fit import LayerFit, leverages
from nullbayes.posterior.layer_leverage import EXACT_EDGE, POSITIONS, PROBE
from nullbayes.posterior.prediction import make_prediction

if TYPE_CHECKING:
    from nullbayes.posterior.layers import LayerNullSpacePosterior

#: leverages within this share of themselves
TOLERANCE = 0.2
# What rounding may do to outputs, relative, and to a log leverage, beside what was asked for.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
LOG_ROUNDING = {torch.float64: 1e-6, torch.float32: 0.02}
COMBINED_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}

NAMES = ("outputs", "novelty")
# Not the fields' own names: a graph may have given those to something else.
PREDICTED = {
    "mean_prediction": "mean",
    "total_uncertainty": "total",
    "epistemic_uncertainty": "epistemic",
}

FLAT, MERGED, SECOND = "flat", "merged", "second"
LEVERAGE, COMBINED = "leverage", "combined"
SCORES = (LEVERAGE, COMBINED)


class Export(NamedTuple):
    """What is asked for: networks in the average, how far leverages may be off, as a share, and which score."""

    samples: int
    tolerance: float
    score: str = LEVERAGE


class Excess(nn.Module):
    """The score ``"combined"`` of what one forward pass left, as :class:`.Combined` has it; in float64.

    Args:
        references: of training examples.
        ordered: numbers of the blocks that count, in the order of the references.
        dtype: of the scores.
    """

    values: Tensor

    def __init__(self, references: References, ordered: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("values", references.values.double())
        self.ordered, self.last = ordered, references.last
        #: whether outputs are logits, whose energy counts
        self.energetic = references.values.shape[1] == len(ordered) + 2

    def forward(self, found: dict[int, tuple[Tensor, Tensor]], energy: Tensor | None) -> Tensor:
        """Mean leverages by block, plain and over squared sizes, and energies ``(B,)``; to scores ``(B,)``.

        A block that was not reached is in no excess of anything.
        """
        plain = [
            self._squared(found[n][0].clamp_min(1e-300).log(), i) for i, n in self._reached(found)
        ]
        total = torch.stack(plain).sum(0) / len(self.ordered)
        if (last := found.get(self.ordered[self.last])) is not None:
            total = total + self._squared(last[1].clamp_min(1e-300).log(), len(self.ordered))
        if energy is not None:
            total = total + ENERGY_WEIGHT * self._squared(energy, len(self.ordered) + 1)
        return total.to(self.dtype)

    def _reached(self, found: dict[int, tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
        return [(i, number) for i, number in enumerate(self.ordered) if number in found]

    def _squared(self, values: Tensor, column: int) -> Tensor:
        centre, spread = self.values[0, column], self.values[1, column]
        return ((values - centre) / spread).clamp_min(0).square()


class LayerModule(Exported):
    """The network with its novelty, in one forward pass and without hooks; a copy, which the posterior does not need.

    ``module(x)`` gives the network's ``outputs`` and ``novelty (B,)``, the score that was asked for. With samples there
    are between them ``mean_prediction``, ``total_uncertainty`` and ``epistemic_uncertainty``, as in
    `nullbayes.Prediction`.

    Attributes:
        output_names: of what it returns, in order; for ``torch.onnx.export(output_names=...)``.
    """

    def __init__(
        self,
        network: nn.Module,
        members: list[nn.Module],
        tape: Tape,
        likelihood: Likelihood,
        user_forward: Forward | None,
        excess: Excess | None = None,
    ) -> None:
        super().__init__()
        self.network, self.members, self.excess = network, nn.ModuleList(members), excess
        self.likelihood, self.user_forward = likelihood, user_forward
        self.tape = tape
        self.layout: tuple[str, ...] = ()
        self.merged = nn.ModuleList()
        self.output_names = (NAMES[0], *PREDICTED, NAMES[1]) if members else NAMES

    def forward(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        """Called as the network is (a mapping may come as one argument); or with what ``forward=`` takes."""
        given: Any = named or (inputs if len(inputs) != 1 else inputs[0])
        self.tape.taken()  # of a pass that failed
        outputs = self._called(self.network, given)
        calls = self.tape.taken()
        if len(calls) != len(self.layout):
            raise ModelError(
                f"{len(calls)} layers were called on these inputs, {len(self.layout)} on those that the module was "
                "made with; a module that is exported has to call the same layers on all inputs."
            )
        novelty = self._novelty(calls, outputs, _length(given))
        if not self.members:
            return outputs, novelty
        draws = torch.stack([self._called(member, given) for member in self.members])
        moments = self.likelihood.moments(draws, outputs, linearised=False)
        return outputs, moments.mean, moments.total, moments.epistemic, novelty

    def _novelty(
        self, calls: list[tuple[int, Call | Done | Put]], outputs: Any, size: Any
    ) -> Tensor:
        def split(call: int, values: Tensor) -> Tensor:
            return _split(values, self.layout[call], size)

        if self.excess is None:
            return scores(calls, split, [m for m in self.merged if isinstance(m, Merged)])
        energy = None
        if self.excess.energetic:
            found = self.likelihood.energy(outputs)
            assert found is not None
            energy = found.double().reshape(size, -1).mean(1)
        novelty: Tensor = self.excess(means(calls, split), energy)
        return novelty

    def settle(self, few: Inputs) -> None:
        """Find out on a few examples which axis of each call's leverages is theirs. Raises `ModelError`."""
        size = batch_size(few)
        self._take_early(few)
        together = self._raw(few)
        alone = [self._raw(take(few, i, i + 1, size)) for i in range(size)]
        layout = []
        for call, values in enumerate(together):
            if any(len(one) != len(together) for one in alone):
                break
            want = torch.stack([one[call].double().sum() for one in alone])
            found = next((p for p in (FLAT, MERGED, SECOND) if _agrees(values, p, want)), None)
            if found is None:
                break
            layout.append(found)
        if not together:
            raise ModelError(
                "no layer is called by the module that stands for the network. Does `forward=` reach the model other "
                "than by its argument? Then a copy cannot stand for it."
            )
        if len(layout) < len(together):
            raise ModelError(
                "no axis of what a layer receives belongs to the examples of a batch, so its leverages cannot be told "
                "apart in an exported module. Score such a network with `posterior.novelty(x, 'leverage')`."
            )
        self.layout = tuple(layout)
        if self.excess is None:
            self._merge(few)

    def _merge(self, few: Inputs) -> None:
        """Find calls that can be finished together: of blocks that are called once, with the examples in front."""
        calls = self._calls(few)
        numbers = Counter(number for number, _ in calls)
        groups: dict[torch.Size, list[int]] = {}
        for i, (number, call) in enumerate(calls):
            key = Merged.key(call)
            if key is not None and numbers[number] == 1 and self.layout[i] == FLAT:
                groups.setdefault(key, []).append(i)
        for places in groups.values():
            puts = [call for _, call in (calls[i] for i in places) if isinstance(call, Put)]
            if len(puts) > 1:
                self.merged.append(Merged(places, puts))

    def _take_early(self, few: Inputs) -> None:
        """Find what changes after a layer has received it, in place: there norms are taken at once."""
        with torch.no_grad():
            self.tape.taken()
            self.tape.versions = []
            self._called(self.network, plain(few))
            versions, self.tape.versions = self.tape.versions, None
            for (_, call), version in zip(self.tape.taken(), versions, strict=True):
                if isinstance(call, Put) and call.a._version != version:
                    call.probe.early = True

    def _calls(self, inputs: Inputs) -> list[tuple[int, Call | Done | Put]]:
        with torch.no_grad():
            self.tape.taken()
            self._called(self.network, plain(inputs))
            return self.tape.taken()

    def _raw(self, inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return [call.values() for _, call in self._calls(inputs)]


def _split(values: Tensor, place: str, size: Any) -> Tensor:
    """``(*lead)`` as ``(B, T)``."""
    if place == SECOND:
        values = values.movedim(1, 0)
    if place == MERGED:
        values = values.reshape(size, -1)
    return values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)


def _length(given: Any) -> Any:
    """Of the batch, which may be a symbol: no ``len``, which would make it a number."""
    values = given.values() if isinstance(given, Mapping) else given
    leaves = (
        [values] if isinstance(values, Tensor) else [t for t in values if isinstance(t, Tensor)]
    )
    return leaves[0].shape[0]


def _agrees(values: Tensor, place: str, want: Tensor) -> bool:
    size = len(want)
    if place == SECOND:
        if values.ndim < 2 or values.shape[1] != size:
            return False
        rows = values.movedim(1, 0)
    elif values.ndim == 0 or values.shape[0] % size or (place == FLAT and len(values) != size):
        return False
    else:
        rows = values
    found = rows.reshape(size, -1).double().sum(1)
    return bool(torch.allclose(found, want, rtol=1e-2, atol=1e-12))


def export_module(
    posterior: LayerNullSpacePosterior, fit: LayerFit, x: Inputs, asked: Export
) -> LayerModule:
    """See `nullbayes.LayerNullSpacePosterior.export_module`."""
    functional, state = posterior.functional, fit.state
    functional.batch(
        x
    )  # of a posterior from a file: which precision it computes in is found out here
    if asked.samples and functional.layouts is not None:
        raise InputError(
            "`samples` needs outputs that are one tensor, and this likelihood takes whatever the model returns; export "
            "with `samples=0`."
        )
    excess = None
    if asked.score == COMBINED:
        if asked.tolerance:
            raise InputError(
                f"`tolerance` is {asked.tolerance} beside score='combined', which counts by how many deviations of "
                "training examples a leverage exceeds theirs: a share of it may be many deviations. Leave "
                "`tolerance` out, or export score='leverage'."
            )
        ordered = posterior._of_layers().ordered
        excess = Excess(posterior._references(), ordered, functional.dtype)
        if excess.energetic and functional.layouts is not None:
            raise InputError(
                "score='combined' counts the energy of logits, and this likelihood takes whatever the model returns; "
                "export score='leverage'."
            )
    edges = [Edge.of(sums, state.delta or EXACT_EDGE) for sums in fit.gathered.sums]
    tape, scorers = Tape(), leverages(state).layers
    probes = probes_of(state.blocks, fit.gathered.sums, edges, scorers, asked.tolerance)
    network = watched(_copied(posterior), state.blocks, probes, tape, POSITIONS)
    members = []
    for sample in state.state_dicts(fit.alpha**-0.5, asked.samples):
        member = _copied(posterior)
        member.load_state_dict(sample)
        members.append(member)
    module = LayerModule(network, members, tape, fit.likelihood, functional.user_forward, excess)
    module.reads_as(functional)
    module = module.to(functional.device).eval().requires_grad_(requires_grad=False)
    size = batch_size(x)
    module.settle(take(x, 0, min(PROBE, size), size))
    _check(posterior, fit, module, x, asked)
    return module


def _copied(posterior: LayerNullSpacePosterior) -> nn.Module:
    model = posterior.model
    try:
        out = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied ({type(error).__name__}: {error}), which an exported module is; drop tensors "
            "that belong to a graph from its attributes."
        ) from error
    wide = posterior.functional.widened
    return out if wide is None else out.to(wide)


def _check(
    posterior: LayerNullSpacePosterior, fit: LayerFit, module: LayerModule, x: Inputs, asked: Export
) -> None:
    """The module gives what the posterior gives. Raises `ModelError` where it does not."""
    given = plain(x)
    try:
        with torch.no_grad():
            if isinstance(given, Mapping):
                found = module(**given)
            else:
                found = module(*given) if isinstance(given, tuple) else module(given)
    except NullBayesError:
        raise
    except Exception as error:
        raise ModelError(
            f"the exported module fails on `x`: {type(error).__name__}: {error}. Leave out the layers concerned "
            "(`parameters=`), or use the posterior itself."
        ) from error
    dtype = posterior.functional.dtype
    off = ROUNDING.get(dtype, ROUNDING[torch.float32])
    room = len(fit.state.blocks.blocks) * (
        math.log1p(asked.tolerance) + LOG_ROUNDING.get(dtype, 0.02)
    )
    wrong = []
    if posterior.functional.layouts is None:
        outputs = posterior.functional.outputs(x, "`x`")
        if not (found[0] - outputs).norm() <= off * outputs.norm().clamp_min(1e-30):
            wrong.append("outputs")
    novelty = posterior.novelty(x, asked.score)
    if asked.score == COMBINED:  # squares of deviations: relative to themselves, and to one
        gap = ((found[-1] - novelty).abs() / (1 + novelty.abs())).max()
        room = COMBINED_ROUNDING.get(dtype, COMBINED_ROUNDING[torch.float32])
    else:
        gap = (found[-1] - novelty).abs().max()
    if not gap <= room:
        wrong.append("novelty")
    if asked.samples:
        draws = fit.state.sampled(x, fit.alpha**-0.5, asked.samples)
        want = make_prediction(fit.likelihood, outputs, draws, "sampled")
        for name, value in zip(PREDICTED, found[1:-1], strict=True):
            reference = getattr(want, PREDICTED[name])
            if not (value - reference).norm() <= 10 * off * reference.norm() + off:
                wrong.append(name)
    if wrong:
        raise ModelError(
            f"the exported module gives other {' and '.join(wrong)} than the posterior on `x`. Does `forward=`, or a "
            "layer, reach the model other than by its argument? Then a copy cannot stand for it."
        )
