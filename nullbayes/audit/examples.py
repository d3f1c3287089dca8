"""At the end: examples drawn from all the data, one at a time, without a captured row.

How far do the samples move what is preserved, and how far would prior directions of the same length? Forward-mode
differentiation answers, or two reverse passes (the derivative of ``wᵀJ`` by ``w``), or central differences of a float64
copy of the network: whatever its operations allow. None of it shares code with the rows that it judges.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nullbayes.audit.batches import counter_generator
from nullbayes.audit.precision import provable
from nullbayes.errors import ModelError
from nullbayes.model.batch import Inputs, batch_size, take, tensor_leaves
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.model.randomness import Keyed

# Examples that an audit takes unless told otherwise, and what their inputs and targets may occupy in bytes.
EXAMPLES = 32
EXAMPLE_BYTES = 2**28
# Samples, and as many prior directions, that each example is moved along; fewer where weights are very many.
DIRECTIONS = 8
DIRECTION_BYTES = 2**28
FORWARD, REVERSE, DIFFERENCES = "forward mode", "two reverse passes", "central differences"
# Half a step of central differences, relative to the weights, in float64.
STEP = 1e-5

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
        #: whether ``nbytes`` allowed fewer than ``wanted``
        self.cut = False
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
            self.cut |= over

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
        moved: ``‖A_n Δ_s‖ (K,)`` for the samples ``which``.
        prior: ``‖A_n ε_k‖ (K,)``.
        rows: ``‖A_n Δ_s‖ (K,)`` as the captured rows have it; None where nobody claims anything.
        before, after: outputs of the trained network and of the first of the samples, re-weighted ``(*out)``.
    """

    number: int
    which: tuple[int, ...]
    moved: Tensor
    prior: Tensor
    rows: Tensor | None
    before: Tensor
    after: Tensor

    @property
    def scale(self) -> float:
        """RMS of what prior directions do."""
        return float(self.prior.square().mean().sqrt())

    @property
    def apart(self) -> float:
        """Largest difference between what was measured and what the rows say."""
        return 0.0 if self.rows is None else float((self.moved - self.rows).abs().max())


@dataclass(frozen=True)
class Measurement:
    """All audited examples, how they were measured, and what was not done."""

    examples: tuple[Moved, ...]
    method: str
    dtype: torch.dtype
    directions: int


def measure_examples(
    functional: FunctionalModel,
    examples: Sequence[Example],
    cotangents: MakeCotangents,
    samples: Tensor,
    scales: Tensor | None = None,
    claimed: Claimed | None = None,
    tolerance: float = 0.0,
) -> Measurement:
    """Move each example along some of the samples, and along prior directions of the same length.

    Args:
        cotangents: what is preserved, evaluated on one example alone.
        samples: weight changes ``Δ (S, P)``.
        scales: prior standard deviations ``(P,)`` where they are not all the same.
        claimed: what the captured rows say, to be compared.
        tolerance: where measurement and rows differ by more than this share of the prior, central differences of the
            network itself decide: forward-mode formulas of rarely used operations have been wrong.

    Raises:
        ModelError: no method works on this network, or it is a network in half precision without a float32 copy.
    """
    if not provable(functional.dtype):
        functional = _in_float32(functional)
    samples = samples.to(functional.dtype)
    each = functional.dtype.itemsize * functional.space.total
    count = max(1, min(DIRECTIONS, len(samples), DIRECTION_BYTES // (2 * each)))
    prior = _prior_directions(samples, scales, count)
    push = Pushing(functional)
    found = []
    for place, example in enumerate(examples):
        which = [(place * count + k) % len(samples) for k in range(count)]
        directions = torch.cat([samples[which], prior])
        moved = _moved(push, example, cotangents, directions, which, claimed)
        if moved.apart > tolerance * moved.scale and push.method != DIFFERENCES:
            moved = _arbitrated(functional, moved, example, cotangents, directions, claimed)
        found.append(moved)
    return Measurement(tuple(found), push.method, functional.dtype, count)


def _prior_directions(samples: Tensor, scales: Tensor | None, count: int) -> Tensor:
    """``(K, P)`` from the prior, as long as samples are (RMS), where the prior is isotropic."""
    white = samples if scales is None else samples / scales.to(samples)
    length = float(torch.linalg.vector_norm(white, dim=1).double().square().mean().sqrt())
    generator = counter_generator(1, samples.shape[1], count)
    drawn = torch.randn(count, samples.shape[1], generator=generator).to(samples)
    drawn = drawn * (length / torch.linalg.vector_norm(drawn, dim=1, keepdim=True))
    return drawn if scales is None else drawn * scales.to(samples)


def _moved(
    push: Pushing,
    example: Example,
    cotangents: MakeCotangents,
    directions: Tensor,
    which: list[int],
    claimed: Claimed | None,
) -> Moved:
    functional = push.functional
    inputs = _as(example.inputs, functional.dtype)
    before = functional.outputs(inputs, f"training example {example.number}")
    change = push(inputs, directions).double().flatten(1)  # (2K, out)
    rows = cotangents(before, example.targets).detach().double().flatten(1)
    norms = torch.linalg.vector_norm(change @ rows.T, dim=1).cpu()
    weights, delta = functional.weights(), functional.space.unflatten(directions[0])
    with torch.no_grad():
        after = functional({n: weights[n] + d for n, d in delta.items()}, inputs)
    told = None if claimed is None else claimed(example.number).double().cpu()[which]
    count = len(which)
    return Moved(
        example.number,
        tuple(which),
        norms[:count],
        norms[count:],
        told,
        before[0],
        after[0],
    )


def _arbitrated(
    functional: FunctionalModel,
    moved: Moved,
    example: Example,
    cotangents: MakeCotangents,
    directions: Tensor,
    claimed: Claimed | None,
) -> Moved:
    """The same by central differences if those agree better with the rows; they know no formula that could be wrong."""
    try:
        push = Pushing(functional, (DIFFERENCES,))
        again = _moved(push, example, cotangents, directions, list(moved.which), claimed)
    except (ModelError, RuntimeError):
        return moved
    return again if again.apart < moved.apart else moved


class Pushing:
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
        self._precise: FunctionalModel | None = None

    @property
    def method(self) -> str:
        return self._left[0]

    def __call__(self, inputs: Inputs, directions: Tensor) -> Tensor:
        """Raises ModelError: every method failed."""
        run = {FORWARD: self._forward, REVERSE: self._reverse, DIFFERENCES: self._differences}
        while True:
            try:
                return run[self.method](inputs, directions).detach()
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                if len(self._left) == 1:
                    raise ModelError(
                        "no derivative of this network along a weight change could be computed for one example alone: "
                        f"{self.method} ended with {type(error).__name__}: {error}. Leave out the parameters behind "
                        "the operation named there (`parameters=`), or replace the operation."
                    ) from error
                self._left.pop(0)

    def _forward(self, inputs: Inputs, directions: Tensor) -> Tensor:
        functional = self.functional
        weights = functional.weights()

        def one(delta: Tensor) -> Tensor:
            tangent = functional.space.unflatten(delta)
            pushed: tuple[Tensor, Tensor] = torch.func.jvp(
                lambda w: functional(w, inputs), (weights,), (tangent,)
            )
            return pushed[1]

        # Frozen randomness knows its examples by the first axis, which `vmap` takes away.
        if self._together and not isinstance(inputs, Keyed):
            try:
                together: Tensor = torch.vmap(one)(directions)
                return together
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                self._together = False
        return torch.stack([one(delta).detach() for delta in directions])

    def _reverse(self, inputs: Inputs, directions: Tensor) -> Tensor:
        weights = self.functional.weights(requires_grad=True)
        leaves = list(weights.values())
        with torch.enable_grad():
            outputs = self.functional(weights, inputs)
            dual = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, leaves, dual, create_graph=True, allow_unused=True
            )
            found = []
            for delta in directions:
                tangent = self.functional.space.unflatten(delta)
                parts = [
                    (g * tangent[n]).sum()
                    for n, g in zip(weights, pulled, strict=True)
                    if g is not None and g.requires_grad
                ]
                total = sum(parts, start=outputs.new_zeros(()))
                if not parts:
                    found.append(torch.zeros_like(outputs))
                    continue
                found.append(torch.autograd.grad(total, dual, retain_graph=True)[0])
        return torch.stack(found)

    def _differences(self, inputs: Inputs, directions: Tensor) -> Tensor:
        functional = self._in_float64()
        weights = functional.weights()
        inputs = _as(inputs, torch.float64)
        size = math.sqrt(sum(float(w.square().sum()) for w in weights.values())) or 1.0
        found = []
        with torch.no_grad():
            for delta in directions.double():
                step = STEP * size / max(float(delta.norm()), 1e-300)
                moved = functional.space.unflatten(delta * step)
                ahead = functional({n: weights[n] + d for n, d in moved.items()}, inputs)
                behind = functional({n: weights[n] - d for n, d in moved.items()}, inputs)
                found.append((ahead - behind) / (2 * step))
        return torch.stack(found)

    def _in_float64(self) -> FunctionalModel:
        if self._precise is None:
            self._precise = converted(self.functional, torch.float64)
        return self._precise


def converted(functional: FunctionalModel, dtype: torch.dtype) -> FunctionalModel:
    """The same network in another precision: a copy, the user's stays as it is."""
    if functional.dtype == dtype:
        return functional
    model = copy.deepcopy(functional.model).to(dtype)
    named = dict(model.named_parameters())
    space = ParameterSpace({name: named[name] for name in functional.space.names})
    return FunctionalModel(
        model, space, functional.user_forward, functional.layouts, functional.randomness
    )


def _in_float32(functional: FunctionalModel) -> FunctionalModel:
    try:
        return converted(functional, torch.float32)
    except Exception as error:
        raise ModelError(
            f"a network in {functional.dtype} is audited on a float32 copy, but copying it failed "
            f"({type(error).__name__}: {error}). Convert it first: `model.float()`."
        ) from error


def _as(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating-point inputs in ``dtype``."""
    return tree_map(
        lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )
