"""At the end: examples drawn from all the data, one at a time, without a captured row.

How far do the samples move what is preserved, and how far would prior directions of the same length? Forward-mode
differentiation answers, or two reverse passes (the derivative of ``wᵀJ`` by ``w``), or central differences of a float64
copy of the network: whatever its operations allow. None of it shares code with the rows that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nullbayes.audit.batches import counter_generator
from nullbayes.audit.network import NetworkCopy, WrittenOut
from nullbayes.errors import ModelError
from nullbayes.model.batch import Inputs, Keyed, batch_size, take, tensor_leaves
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace

# Examples that an audit takes unless told otherwise, and what their inputs and targets may occupy in bytes.
EXAMPLES = 20
EXAMPLE_BYTES = 2**26
# Samples, and as many prior directions, that each example is moved along; fewer where weights are very many.
DIRECTIONS = 8
DIRECTION_BYTES = 2**28
FORWARD, REVERSE, DIFFERENCES = "forward mode", "two reverse passes", "central differences"
# Half a step of central differences, relative to the weights, in float64: short, as a step across the kink of a ReLU
# counts in full, and long against rounding.
STEP = 3e-8

#: ``(outputs (1, *out), targets) -> (C, 1, *out)``: the rows of what is preserved, for one example.
MakeCotangents = Callable[[Tensor, Any], Tensor]
#: ``number of an example -> ‖A_n Δ_s‖ (S,)`` as the captured rows have it.
Claimed = Callable[[int], Tensor]


# -- which examples ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A training example by itself; ``number`` counts from 0 in the order of the loader."""

    number: int
    inputs: Inputs
    targets: Any


class Reservoir:
    """A uniform sample of a stream of batches, the same however the stream is cut into batches.

    Each example has a priority that follows from the seed and its number alone; those with the lowest stay.

    Args:
        wanted: examples at most.
        nbytes: what they may occupy; at least one example stays whatever its size.
    """

    def __init__(self, wanted: int = EXAMPLES, nbytes: int = EXAMPLE_BYTES, seed: int = 0) -> None:
        self.wanted, self.nbytes, self.seed = wanted, nbytes, seed
        self.seen = 0
        self.batches = 0
        self._cut = False  # whether `nbytes` allowed fewer than `wanted`
        self._bound = math.inf
        self._kept: list[tuple[float, int, Example]] = []  # priority, bytes

    def offer(self, inputs: Inputs, targets: Any) -> None:
        """The next batch of the stream; what stays of it is copied."""
        size = batch_size(inputs)
        priorities = _priorities(self.seed, self.seen, size)
        for n in np.argsort(priorities)[: self.wanted].tolist():
            priority = float(priorities[n])
            if priority >= self._bound:
                break
            number = self.seen + n
            example = Example(
                number,
                tree_map(_copied, take(inputs, n, n + 1)),
                tree_map(_copied, take(targets, n, n + 1, size)),
            )
            taken = sum(t.nbytes for t in tensor_leaves((example.inputs, example.targets)))
            self._kept.append((priority, taken, example))
            self._kept.sort(key=lambda entry: entry[0])
            self._shrink()
        self.seen += size
        self.batches += 1

    def _shrink(self) -> None:
        while len(self._kept) > 1:
            over = sum(taken for _, taken, _ in self._kept) > self.nbytes
            if len(self._kept) <= self.wanted and not over:
                break
            # From now on nothing above this priority is taken, so what stays remains a uniform sample.
            self._bound = self._kept.pop()[0]
            self._cut |= over

    @property
    def reduced(self) -> str | None:
        """What is less than a full audit, and why; None: nothing."""
        kept = len(self._kept)
        if self._cut:
            return f"Only {kept:,} examples were drawn: more would take over {self.nbytes / 2**20:.0f} MiB."
        if kept < min(EXAMPLES, self.seen):
            return f"Only {kept:,} examples were drawn, as `audit={self.wanted}` asked, instead of {EXAMPLES}."
        return None

    @property
    def examples(self) -> list[Example]:
        """What was drawn, in the order of the stream."""
        return sorted((example for _, _, example in self._kept), key=lambda e: e.number)


def _copied(leaf: Any) -> Any:
    """A slice would keep its whole batch in memory."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _priorities(seed: int, start: int, size: int) -> Any:
    """Uniform numbers for examples ``start ... start + size``: splitmix64 of seed and number (Steele et al. 2014)."""
    key = np.random.SeedSequence(abs(seed)).generate_state(1, np.uint64)
    x = (np.arange(start + 1, start + size + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


# -- how far they move ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """What happens to one example: ``K`` of the samples, and ``K`` prior directions of the same length.

    Attributes:
        moved: ``‖A_n Δ_s‖ (K,)`` for the samples ``which``, to first order.
        prior: ``‖A_n ε_k‖ (K,)``.
        rows: ``‖A_n Δ_s‖ (K,)`` as the captured rows have it; None where nobody claims anything.
        before, after: outputs of a copy of the network and of the first of those samples, re-weighted ``(*out)``;
            None where the network cannot be copied.
        reweighted: how far that moves what is preserved, ``‖v_nᵀ (after - before)‖``.
        deployed: distance of ``before`` from the outputs that the rows belong to, relative.
    """

    number: int
    which: tuple[int, ...]
    moved: Tensor
    prior: Tensor
    rows: Tensor | None
    before: Tensor | None = None
    after: Tensor | None = None
    reweighted: float = 0.0
    deployed: float = 0.0

    @property
    def scale(self) -> float:
        """RMS of what prior directions do."""
        return float(self.prior.square().mean().sqrt())

    @property
    def apart(self) -> float:
        """Largest difference between what was measured and what the rows say."""
        return 0.0 if self.rows is None else float((self.moved - self.rows).abs().max())


@dataclass(frozen=True)
class Question:
    """What is asked of every example.

    Attributes:
        cotangents: what is preserved, evaluated on one example alone.
        samples: weight changes ``Δ (S, P)`` at prior precision one; ``scale``: what they are multiplied with where the
            network is re-weighted.
        prior: directions ``(K, P)`` as long as samples are.
        claimed: what the captured rows say, to be compared.
    """

    cotangents: MakeCotangents
    samples: Tensor
    prior: Tensor
    scale: float = 1.0
    claimed: Claimed | None = None

    def which(self, place: int) -> tuple[int, ...]:
        """The samples that example ``place`` of those audited is moved along: in turn, so that all are used."""
        count = len(self.prior)
        return tuple((place * count + k) % len(self.samples) for k in range(count))


def prior_directions(
    space: ParameterSpace, samples: Tensor, scales: Tensor | None = None
) -> Tensor:
    """``(K, P)`` from the prior, independent of the samples and as long as they are (RMS).

    Args:
        scales: prior standard deviations ``(P,)`` where they are not all the same; lengths are counted in them.
    """
    count = DIRECTION_BYTES // (2 * samples.element_size() * space.total)
    count = max(1, min(DIRECTIONS, len(samples), count))
    white = samples if scales is None else samples / scales.to(samples)
    length = float(torch.linalg.vector_norm(white, dim=1).double().square().mean().sqrt())
    # Samples of no length, where the data determine every weight, are rounding; they move nothing.
    length = max(length, float(torch.finfo(samples.dtype).eps) * space.total**0.5)
    generator = counter_generator(1, space.total, count)
    drawn = torch.randn(count, space.total, generator=generator, dtype=torch.float32).to(samples)
    space.fix_(drawn)
    drawn *= length / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    return drawn if scales is None else drawn * scales.to(samples)


class Examiner:
    """Moves examples of a network, one at a time."""

    def __init__(self, functional: FunctionalModel) -> None:
        self.functional = functional
        self.along = Derivative(functional)
        #: why no copy of the network could be made; None where one was
        self.no_copy: str | None = None
        try:
            self._copy: NetworkCopy | None = NetworkCopy(functional)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a network's attributes make of being copied
            self._copy, self.no_copy = None, f"{type(error).__name__}: {error}"

    def examine(
        self, example: Example, place: int, question: Question, tolerance: float = 0.0
    ) -> Moved:
        """One example under some of the samples.

        Args:
            place: which of the audited examples this is.
            tolerance: where measurement and rows differ by more than this share of the prior, central differences of a
                copy of the network decide: they know no formula that could be wrong, as some of PyTorch's have been.

        Raises:
            ModelError: no derivative along a weight change can be computed.
        """
        found = self._moved(self.along, example, place, question)
        if found.apart > tolerance * found.scale and self.along.method != DIFFERENCES:
            try:
                again = self._moved(
                    Derivative(self.functional, (DIFFERENCES,)), example, place, question
                )
            except ModelError:
                return found
            if again.apart < found.apart:
                return again
        return found

    def _moved(self, along: Derivative, example: Example, place: int, question: Question) -> Moved:
        where = f"training example {example.number}"
        outputs = self.functional.outputs(example.inputs, where)
        rows = question.cotangents(outputs, example.targets).detach().double().flatten(1)
        which = question.which(place)
        directions = torch.cat([question.samples[list(which)], question.prior])
        change = along(example.inputs, directions).double().flatten(1)  # (2K, out)
        norms = torch.linalg.vector_norm(change @ rows.T, dim=1).cpu()
        claimed = None
        if question.claimed is not None:
            claimed = question.claimed(example.number).double().cpu()[list(which)]
        count = len(which)
        found = Moved(example.number, which, norms[:count], norms[count:], claimed)
        if self._copy is None:
            return found
        before = self._copy.outputs(example.inputs)
        after = self._copy.outputs(example.inputs, directions[0] * question.scale)
        away = rows @ (after - before).double().flatten() / question.scale
        off = (before.double() - outputs.double()).norm() / outputs.double().norm().clamp_min(
            1e-300
        )
        return replace(
            found,
            before=before[0],
            after=after[0],
            reweighted=float(away.norm()),
            deployed=float(off),
        )


class Derivative:
    """``J(x) Δ_k (K, *out)`` of one example for directions ``(K, P)``, by the first method that works.

    What fails on one example is not tried again on the others.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        methods: Sequence[str] = (FORWARD, REVERSE, DIFFERENCES),
    ) -> None:
        self.functional = functional
        self._left = list(methods)
        self._together = True
        self._precise: NetworkCopy | None = None

    @property
    def method(self) -> str:
        return self._left[0]

    def __call__(self, inputs: Inputs, directions: Tensor) -> Tensor:
        """Raises ModelError: every method failed."""
        run = {FORWARD: self._forward, REVERSE: self._reverse, DIFFERENCES: self._differences}
        while True:
            # Fused attention has neither forward mode nor a derivative of its backward pass.
            fused = self.method == DIFFERENCES
            try:
                with nullcontext() if fused else WrittenOut():
                    return run[self.method](inputs, directions).detach()
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except (
                Exception
            ) as error:  # an operation without a derivative of that kind, in whatever words
                if len(self._left) == 1:
                    raise ModelError(
                        "the audit found no way to differentiate this network along a weight change, one example "
                        f"alone; {self.method} ended with {type(error).__name__}: {error}. Leave out the parameters "
                        "before the operation named there (`parameters=`), or replace the operation."
                    ) from error
                self._left.pop(0)

    def _forward(self, inputs: Inputs, directions: Tensor) -> Tensor:
        functional = self.functional
        weights = functional.weights()

        def one(delta: Tensor) -> Tensor:
            tangent = functional.space.unflatten(delta)
            change: Tensor = torch.func.jvp(
                lambda w: functional(w, inputs), (weights,), (tangent,)
            )[1]
            return change

        # Frozen randomness knows its examples by the first axis, which `vmap` takes away.
        if self._together and not isinstance(inputs, Keyed):
            try:
                together: Tensor = torch.vmap(one)(directions)
                return together
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                self._together = False
        return torch.stack([one(delta).detach() for delta in directions])

    def _reverse(self, inputs: Inputs, directions: Tensor) -> Tensor:
        weights = self.functional.weights(requires_grad=True)
        with torch.enable_grad():
            outputs = self.functional(weights, inputs)
            dual = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, list(weights.values()), dual, create_graph=True, allow_unused=True
            )
            # Unused weights move nothing, and what is not a function of `dual` is zero.
            used = {
                n: g
                for n, g in zip(weights, pulled, strict=True)
                if g is not None and g.requires_grad
            }
            found = []
            for delta in directions:
                tangent = self.functional.space.unflatten(delta)
                if not used:
                    found.append(torch.zeros_like(outputs))
                    continue
                total = torch.stack([(g * tangent[n]).sum() for n, g in used.items()]).sum()
                found.append(torch.autograd.grad(total, dual, retain_graph=True)[0])
        return torch.stack(found)

    def _differences(self, inputs: Inputs, directions: Tensor) -> Tensor:
        if self._precise is None:
            self._precise = NetworkCopy(self.functional, torch.float64)
        weights = self.functional.weights().values()
        size = math.sqrt(sum(float(w.double().square().sum()) for w in weights)) or 1.0
        found = []
        for delta in directions.double():
            step = STEP * size / max(float(delta.norm()), 1e-300)
            ahead = self._precise.outputs(inputs, step * delta).double()
            behind = self._precise.outputs(inputs, -step * delta).double()
            found.append((ahead - behind) / (2 * step))
        return torch.stack(found)
