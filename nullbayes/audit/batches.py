"""Every batch at capture: do the rows belong to this network, and is each example a function of itself?

Two questions that plain automatic differentiation and plain forward passes answer, without hooks:

- one random weight for each row: the weighted sum of all rows of a batch is the gradient of one number, which one
  ordinary backward pass of the network gives;
- an example evaluated in another company gives the same outputs, with and without gradients, and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nullbayes.audit.draws import without_draws
from nullbayes.audit.precision import FLOOR, LARGEST, on_precision, tolerance
from nullbayes.errors import ModelError, NullBayesError
from nullbayes.model.batch import Inputs, batch_size, select, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace

# How much more an example with small cotangents may count than the one with the largest: rows of confident examples
# are small, and would go unnoticed in the sum.
MOST_WEIGHT = 1e3
# Outputs that are small against the others are compared with this share of the largest.
SMALL_OUTPUT = 1e-2
# How many times the difference of two plain passes rows may be away from one of them.
NOISE = 10.0
# Passes that measure rounding by the outputs, at most.
BY_OUTPUTS = 16

# Numbers whose copy in float64 fits in a cache.
CACHED = 2**16


# -- rows ----------------------------------------------------------------------------------------


def plain_gradient(functional: FunctionalModel, inputs: Inputs, cotangents: Tensor) -> Tensor:
    """``Σ_n v_nᵀ J_n (P,)`` by one backward pass of the unhooked network over a batch.

    Args:
        cotangents: ``v (B, *out)``, one for each example.

    Returns:
        In the working precision; zeros where no gradient path leads and at coordinates that stay where they are.

    Raises:
        ModelError: the outputs have another shape than the cotangents.
    """
    weights = functional.weights(requires_grad=True)
    with torch.enable_grad():
        outputs = functional(weights, inputs)
    if outputs.shape != cotangents.shape:
        raise ModelError(
            f"the network returned shape {tuple(outputs.shape)} where {tuple(cotangents.shape)} came before; its "
            "outputs must depend on weights and inputs alone (look for a state that changes between calls)."
        )
    return _gradient(functional, weights, [outputs], [cotangents])


def gradient_of_parts(
    functional: FunctionalModel,
    weights: dict[str, Tensor],
    parts: Sequence[tuple[list[int], Tensor]],
    cotangents: Tensor,
) -> Tensor:
    """:func:`plain_gradient` of the examples in ``parts``, from outputs that have their graph still.

    Args:
        weights: the leaves of the graph, by name.
        parts: places in the batch, and the outputs there, as :func:`shown_separate` gives them.
        cotangents: ``(B, *out)``, of all examples of the batch.
    """
    return _gradient(
        functional, weights, [out for _, out in parts], [cotangents[part] for part, _ in parts]
    )


def _gradient(
    functional: FunctionalModel,
    weights: dict[str, Tensor],
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> Tensor:
    space = functional.space
    found = torch.zeros(space.total, dtype=space.dtype, device=space.device)
    pairs = [(o, c.to(o)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return found
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], list(weights.values()), [c for _, c in pairs], allow_unused=True
    )
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            slot = space.by_name[name]
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            found[slot.start : slot.stop] = dense.reshape(-1)
    return space.fix_(found)


def gradient_by_examples(functional: FunctionalModel, inputs: Inputs, cotangents: Tensor) -> Tensor:
    """:func:`plain_gradient`, by one pass for each example: the same but for rounding."""
    parts = [
        plain_gradient(functional, take(inputs, n, n + 1), cotangents[n : n + 1])
        for n in range(len(cotangents))
    ]
    return torch.stack(parts).sum(0)


def gradient_by_outputs(
    functional: FunctionalModel, inputs: Inputs, cotangents: Tensor, weights: Tensor
) -> Tensor:
    """:func:`plain_gradient` of the weighted sum of all rows, by one pass for each output: the same but for rounding.

    Args:
        cotangents: ``(C, B, *out)``; ``weights``: of each row, as :func:`random_weights` has them.
    """
    count, size = cotangents.shape[:2]
    each = weights.reshape(size, count, *[1] * (cotangents.ndim - 2)).to(cotangents)
    found = torch.zeros(functional.space.total, dtype=functional.space.dtype, device=weights.device)
    for some in torch.arange(count).tensor_split(min(count, BY_OUTPUTS)):
        total = torch.zeros_like(cotangents[0])
        for c in some.tolist():
            total += each[:, c] * cotangents[c]
        found += plain_gradient(functional, inputs, total)
    return found


def random_weights(cotangents: Tensor, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """One weight for each row of batch ``index``, and the cotangents that they add up to.

    Signs are random and sizes lie between 0.5 and 1.5, so no two rows can be exchanged unnoticed and none is left
    out; rows with small cotangents count for more (up to :data:`MOST_WEIGHT` times).

    Args:
        cotangents: ``(C, B, *out)``.

    Returns:
        ``r (B·C,)`` in the order of the rows, (n, c), and ``Σ_c r_{n,c} v_{c,n} (B, *out)``.
    """
    count, size = cotangents.shape[:2]
    generator = counter_generator(seed, index)
    number = torch.rand(size, count, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (size, count), generator=generator) * 2.0 - 1.0
    weights = ((0.5 + number) * sign).to(cotangents.device)
    norms = torch.stack(
        [torch.linalg.vector_norm(c.reshape(size, -1), dim=1) for c in cotangents], 1
    )
    largest = norms.max()
    factor = largest / norms.clamp_min(largest / MOST_WEIGHT)
    weights = weights * torch.where(largest > 0, factor, torch.ones_like(factor)).to(weights)
    weights = weights.to(cotangents)
    total = torch.zeros_like(cotangents[0])
    shape = (size, *[1] * (cotangents.ndim - 2))
    for c in range(
        count
    ):  # `cotangents` may be one expanded identity, which a product would write out
        total += weights[:, c].reshape(shape) * cotangents[c]
    return weights.reshape(-1), total


def counter_generator(seed: int, *counters: int) -> torch.Generator:
    """A generator of its own for each place in the stream; the global one is neither read nor moved."""
    state = np.random.SeedSequence([abs(seed), *counters]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def gradient_mismatches(
    space: ParameterSpace,
    expected: Tensor,
    found: Tensor,
    scale: float | None = None,
    rounding: torch.dtype | None = None,
    noise: Tensor | None = None,
) -> list[str]:
    """Names of the parameters whose part of ``found (P,)`` is not that of ``expected (P,)``.

    Relative to the working precision and capped, so a model in half precision usually fails: prove it on a float32
    copy (:func:`nullbayes.audit.precision.provable`).

    Args:
        scale: the size of a whole row; a gradient that is zero in exact arithmetic is held against it. Default:
            the norm of ``expected``.
        rounding: the least precise numbers that the network computes with (autocast inside); None: the working ones.
        noise: ``(P,)``, by how much two plain passes differ from each other: in an ill-conditioned network, such as
            one with a LayerNorm of two features, rounding is larger than elsewhere. Capped like everything.
    """
    rounding = rounding or space.dtype
    allowed = tolerance(rounding, space.device)
    parts = [slice(slot.start, slot.stop) for slot in space.slots]
    measured = [_norm(expected)] if scale is None else []
    measured += [_norm(expected[part]) for part in parts]
    # Numbers that agree are subtracted without an error, so no copy in float64 is needed.
    measured += [_norm(found[part] - expected[part]) for part in parts]
    measured += [] if noise is None else [_norm(noise[part]) for part in parts]
    values: list[float] = torch.stack(measured).tolist()  # of all parameters by one read
    whole = values.pop(0) if scale is None else scale
    floor = min(FLOOR * torch.finfo(rounding).eps, allowed) * whole
    count, bad = len(parts), []
    for i, slot in enumerate(space.slots):
        size, away, apart = values[i], values[count + i], floor
        if noise is not None:
            apart = max(floor, min(NOISE * values[2 * count + i], LARGEST * size))
        if not away <= allowed * size + apart:  # not a number is a mismatch
            bad.append(slot.name)
    return bad


def _norm(values: Tensor) -> Tensor:
    """Summed in float64, in pieces that stay in a cache: a copy of 27 million numbers takes five times as long."""
    if values.device.type != "cpu":
        return torch.linalg.vector_norm(values, dtype=torch.float64)
    squares = [_square(piece.double()) for piece in values.reshape(-1).split(CACHED)]
    return torch.stack(squares).sum().sqrt()


def _square(values: Tensor) -> Tensor:
    return torch.dot(values, values)


# -- examples ------------------------------------------------------------------------------------


def check_separate(
    functional: FunctionalModel, inputs: Inputs, outputs: Tensor, where: str, index: int = 0
) -> None:
    """Each example is a function of itself: in other company, in another order, with gradients, drawing nothing.

    One forward pass over the batch, in parts and with gradients: an example alone, and the others in reverse order cut
    in two unequal parts. Where that disagrees with ``outputs``, more passes find out why.

    Args:
        outputs: ``(B, *out)`` of the batch without gradients.
        index: which batch this is; decides which example stands alone.

    Raises:
        ModelError: which example of which batch, by how much, and the mend.
    """
    weights = functional.weights(requires_grad=True)
    parts = _parts(range(batch_size(inputs, where)), index)
    for _ in _shown(functional, weights, inputs, outputs, parts, where):
        pass


def shown_separate(
    functional: FunctionalModel,
    weights: dict[str, Tensor],
    inputs: Inputs,
    outputs: Tensor,
    numbers: range,
    where: str,
) -> list[tuple[list[int], Tensor]]:
    """:func:`check_separate` of the examples ``numbers`` of a batch alone: their places, and their outputs with graph.

    Args:
        weights: the leaves that the graph is to have.

    Raises:
        ModelError: as there.
    """
    parts = _parts(numbers, numbers.start)
    return list(_shown(functional, weights, inputs, outputs, parts, where))


def _shown(
    functional: FunctionalModel,
    weights: dict[str, Tensor],
    inputs: Inputs,
    outputs: Tensor,
    parts: Sequence[list[int]],
    where: str,
) -> Iterator[tuple[list[int], Tensor]]:
    size = len(outputs)
    for part in parts:
        piece = select(inputs, torch.tensor(part, device=functional.device))
        with torch.enable_grad():
            again = _evaluated(functional, weights, piece, part, size, where)
        worst = _difference(again.detach(), outputs[part], outputs, functional.rounding)
        if worst is not None:
            raise _explained(functional, inputs, outputs, part, worst, where)
        yield part, again
        del again  # and the graph behind it, unless it is kept


def _parts(numbers: range, index: int) -> list[list[int]]:
    """One example alone, the others in reverse order in two parts; a lone example is evaluated twice over."""
    size = len(numbers)
    if size == 1:
        return [[numbers.start, numbers.start]]
    drawn = torch.randint(0, size, (1,), generator=counter_generator(0, index, size))
    alone = numbers[int(drawn)]
    others = [n for n in reversed(numbers) if n != alone]
    cut = len(others) // 3
    return [part for part in ([alone], others[:cut], others[cut:]) if part]


def _evaluated(
    functional: FunctionalModel,
    weights: dict[str, Tensor],
    piece: Inputs,
    part: list[int],
    size: int,
    where: str,
) -> Tensor:
    """Outputs of a part of a batch; whatever the model raises on it becomes a :class:`ModelError`, as do draws."""
    try:
        again = without_draws(functional, lambda: functional(weights, piece), where)
    except (NullBayesError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{where}: the network takes all {size} examples together, but fails on {len(part)} of them "
            f"({type(error).__name__}: {error}). An example must not need the others: look for a batch size "
            "written into the network, or shared inputs (masks, positions) that are as long as the batch."
        ) from error
    if again.ndim == 0 or len(again) != len(part):
        raise ModelError(
            f"{where}: {len(part)} of the {size} examples give outputs of shape {tuple(again.shape)}; expected "
            "one entry per example on the first axis. Look for `squeeze()` without an axis, or a reduction over "
            "the batch, in the forward pass or in `forward=`."
        )
    return again


def _difference(
    again: Tensor, outputs: Tensor, batch: Tensor, rounding: torch.dtype
) -> tuple[int, float, float] | None:
    """The example that differs most, by how much, and what outputs reach; None: no more than rounding explains."""
    if again.shape != outputs.shape:
        return 0, float("inf"), float(batch.abs().max())
    if not again.numel():
        return None
    column = batch.detach().abs().amax(0)
    largest = column.max()
    # An output that is small against the others by rounding is not held against itself.
    scale = column.clamp_min(SMALL_OUTPUT * largest)
    away = (again - outputs).abs()
    off = ~(away <= tolerance(rounding, batch.device) * scale)
    if not bool(off.any()):
        return None
    flat = (away / scale.clamp_min(torch.finfo(batch.dtype).tiny)).reshape(len(away), -1).amax(1)
    which = int(flat.nan_to_num(nan=float("inf")).argmax())
    return which, float(away[which].max()), float(largest)


def _explained(
    functional: FunctionalModel,
    inputs: Inputs,
    outputs: Tensor,
    part: list[int],
    worst: tuple[int, float, float],
    where: str,
) -> ModelError:
    """Why an example's outputs changed, found by one change at a time."""
    which, away, reach = worst
    found = f"{where}: the outputs of example {part[which]} change by {away:.2e} (outputs reach {reach:.2e}) "
    end = on_precision(outputs.dtype)
    weights = functional.weights()
    with torch.no_grad():
        same = functional(weights, inputs)
    if _difference(same, outputs, outputs, functional.rounding) is not None:
        return ModelError(
            f"{found}from one call of the network to the next: it draws random numbers of its own or keeps a state "
            "between calls. Call `model.eval()`, reset the state in the forward pass, pass random numbers as inputs, "
            f'or freeze those of torch (`randomness="frozen"`).{end}'
        )
    with torch.enable_grad():
        graded = functional(functional.weights(requires_grad=True), inputs).detach()
    if _difference(graded, outputs, outputs, functional.rounding) is not None:
        return ModelError(
            f"{found}when gradients are recorded: the network takes another path then, such as the fused one of "
            "`nn.TransformerEncoder` in evaluation mode, and derivatives belong to that other path. Call "
            "`torch.backends.mha.set_fastpath_enabled(False)` (for deployment as well), or look for "
            f"`torch.is_grad_enabled()` and `requires_grad` in the forward pass.{end}"
        )
    order = "alone" if len(part) == 1 else f"together with {len(part) - 1} others instead of all"
    return ModelError(
        f"{found}when it is evaluated {order}: the network mixes the examples of a batch, so no example has rows "
        "of its own. Call `model.eval()`, replace layers that use batch statistics, put the batch on the first axis "
        f"of every tensor, and pass what all examples share with a first axis of another length than the batch.{end}"
    )
