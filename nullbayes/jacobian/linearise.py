"""Functions drawn from a posterior: what its weight samples do to the outputs at given inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nullbayes.audit.batches import counter_generator, plain_gradient
from nullbayes.audit.signatures import Signature
from nullbayes.common.forward_mode import jvp
from nullbayes.common.memory import bounded, working_bytes
from nullbayes.jacobian.capture.batches import examples_per_capture
from nullbayes.jacobian.capture.checking import captured_at_use, separate_at_use
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.model.precision import tolerance
from nullbayes.model.smooth import Mathematical as Mathematical
from nullbayes.model.smooth import smooth

Centre = Callable[[Tensor], Tensor]
Product = Callable[[FunctionalModel, dict[str, Tensor], Inputs], Tensor]

# Up to this many outputs per sample, reverse mode (all rows at once) is cheaper than one
# forward-mode pass for each sample.
REVERSE_OUTPUTS_PER_SAMPLE = 2
# Outputs whose rows are captured at a time, where no other product serves.
ROWS_AT_ONCE = 64


def first_output(functional: FunctionalModel, inputs: Inputs, where: str = "the inputs") -> Tensor:
    """``f(θ̂, x) (1, *out)`` of the first example alone, for its shape; errors speak of the batch."""
    inputs = functional.batch(inputs)
    try:
        return functional.outputs(take(inputs, 0, 1), where)
    except Exception:
        functional.outputs(inputs, where)
        raise


class OutputsChanged(Exception):
    """An example has outputs of another shape than those of earlier batches of the kind."""


def output_shape(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, where: str = "the inputs"
) -> torch.Size:
    """The shape of one example's outputs, from an earlier batch of the kind where there was one."""
    inputs = functional.batch(inputs)
    kind = Signature.of(inputs)
    known = plan.shapes.get(kind)
    if known is None:
        known = first_output(functional, inputs, where)[0].shape
        if plan.proved.covers(kind):
            plan.shapes[kind] = known
    return known


Found = TypeVar("Found")


def by_known_shapes(plan: CapturePlan, ask: Callable[[], Found]) -> Found:
    """What ``ask`` gives; where outputs have another shape than earlier ones, once more without that knowledge."""
    try:
        return ask()
    except OutputsChanged:
        plan.shapes.clear()
        return ask()


@contextmanager
def blaming_inputs(functional: FunctionalModel, inputs: Inputs, where: str) -> Iterator[None]:
    """Errors within it are said to be those of the inputs where a plain forward pass fails on them too."""
    try:
        yield
    except OutputsChanged:
        raise
    except Exception:
        functional.outputs(inputs, where)
        raise


def output_rows(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    outputs: int,
    vectors: Tensor,
    scales: dict[str, float] | None = None,
    centre: Centre = lambda values: values,
) -> Iterator[tuple[Tensor, JacobianOperator]]:
    """``f(θ̂, x) (b, *out)`` and all rows ``J(x)`` of its ``outputs`` numbers, a piece at a time.

    Args:
        centre: a projection of output changes ``(S, B, *out)``; rows are those of what it leaves.
        vectors: ``(S, P)``, what the rows are to be multiplied with. A product reads all of it, so
            pieces may take as much memory as it does.

    Raises:
        OutputsChanged: an example has not so many outputs.
    """

    def every_output(point: Tensor) -> SimpleNamespace:
        """One cotangent per output number: ``(O, B, *out)``."""
        count = point[0].numel()
        eye = torch.eye(count, dtype=point.dtype, device=point.device)
        values = centre(eye.reshape(count, 1, *point.shape[1:]))
        return SimpleNamespace(values=values.expand(count, *point.shape), point=point)

    inputs = functional.batch(inputs)
    room = working_bytes(functional.device)
    if not bounded(functional.device):  # no budget says less
        room = max(room, vectors.nbytes)
    size, step = batch_size(inputs), examples_per_capture(functional, plan, outputs, room)
    for start in range(0, size, step):
        piece = take(inputs, start, min(start + step, size))
        block, made = captured_at_use(functional, plan, piece, every_output, scales)
        if made.point[0].numel() != outputs:
            raise OutputsChanged
        yield made.point, JacobianOperator(functional.space, [block])


def linearised_outputs(
    functional: FunctionalModel,
    plan: CapturePlan,
    samples: Tensor,
    inputs: Inputs,
    where: str = "the inputs",
    point: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (B, *out)`` and ``J(x) Δ_s (S, B, *out)`` for ``samples (S, P)``, in any precision.

    Args:
        point: the outputs of these very examples, which were shown to be functions of themselves; None: they are
            computed, and shown to be so where no rows are captured.
    """
    inputs = functional.batch(inputs)
    if point is not None and point[0].numel() > REVERSE_OUTPUTS_PER_SAMPLE * len(samples):
        return point, forward_mode(functional, plan, samples, inputs, proved=True)
    return by_known_shapes(plan, lambda: _linearised(functional, plan, samples, inputs, where))


def _linearised(
    functional: FunctionalModel, plan: CapturePlan, samples: Tensor, inputs: Inputs, where: str
) -> tuple[Tensor, Tensor]:
    shape = output_shape(functional, plan, inputs, where)
    functional.expect_shape(inputs, shape, where)
    if shape.numel() > REVERSE_OUTPUTS_PER_SAMPLE * len(samples):
        return functional.outputs(inputs, where), forward_mode(functional, plan, samples, inputs)
    points, changes = [], []
    with blaming_inputs(functional, inputs, where):
        for point, rows in output_rows(functional, plan, inputs, shape.numel(), samples):
            if point.shape[1:] != shape:
                raise OutputsChanged
            points.append(point)
            changes.append(rows.matvec(samples).reshape(len(samples), -1, *shape))
    return torch.cat(points), torch.cat(changes, dim=1)


def forward_mode(
    functional: FunctionalModel,
    plan: CapturePlan,
    samples: Tensor,
    inputs: Inputs,
    *,
    proved: bool = False,
) -> Tensor:
    """``J(x) Δ_s (S, B, *out)`` one sample at a time, whatever the number of outputs.

    Forward-mode differentiation where every operation of the model has it; otherwise two reverse
    passes (the derivative of ``wᵀJ`` by ``w``), which every differentiable model has. A batch is taken
    in pieces: a pass holds a multiple of the model's own activations.

    Args:
        proved: these very examples were shown to be functions of themselves, and are audited elsewhere: a way to
            differentiate is then compared with a reverse pass once, and not for each piece.
    """
    inputs = functional.batch(inputs) if proved else separate_at_use(functional, inputs)[0]
    size, step, pieces = batch_size(inputs), examples_per_capture(functional, plan, 1), []
    for start in range(0, size, step):
        piece, out = take(inputs, start, min(start + step, size)), []
        for n, delta in enumerate(samples):
            delta = delta.to(functional.dtype)
            confirm = n == 0 and not (proved and plan.confirmed == plan.product)
            change = _along(functional, plan, delta, piece, confirm=confirm)
            if change is None:  # as for one sample, so for all
                out.append(_by_rows(functional, plan, samples[n:], piece))
                break
            out.append(change[None])
        pieces.append(torch.cat(out))
    return torch.cat(pieces, dim=1)


def _along(
    functional: FunctionalModel, plan: CapturePlan, delta: Tensor, inputs: Inputs, *, confirm: bool
) -> Tensor | None:
    """``J(x) Δ (B, *out)`` by the first way that this model's operations allow; None: by none of them.

    Args:
        confirm: compare with a reverse pass: an operation without a derivative of the kind that a way needs may raise,
            or drop out in silence.
    """
    delta = delta.to(functional.space.dtype)  # stored in half, perhaps
    tangent = functional.space.unflatten(delta)
    ways = _products()
    while plan.product < len(ways):
        product, mode = ways[plan.product]
        try:
            with mode():
                change = product(functional, tangent, inputs).detach()
            if not confirm:
                return change
            if _confirmed(functional, delta, inputs, change):
                plan.confirmed = plan.product
                return change
            plan.product += 1
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # an operation without a derivative of that kind, in whatever words
            plan.product += 1
    return None


def _confirmed(functional: FunctionalModel, delta: Tensor, inputs: Inputs, change: Tensor) -> bool:
    """Whether ``vᵀ (J Δ)`` is ``(vᵀ J) Δ`` for a random ``v``."""
    generator = counter_generator(0, change.numel())
    v = torch.randn(change.shape, generator=generator, dtype=torch.float64).to(change)
    pulled = plain_gradient(functional, inputs, v)
    ours, theirs = (v * change).double(), (pulled * delta).double()
    # Each sum may cancel; rounding is that of its terms.
    size = max(float(ours.norm()), float(theirs.norm()))
    allowed = tolerance(functional.rounding, functional.device) * size
    return abs(float(ours.sum() - theirs.sum())) <= allowed


def _by_rows(
    functional: FunctionalModel, plan: CapturePlan, samples: Tensor, inputs: Inputs
) -> Tensor:
    """``J(x) Δ_s (S, B, *out)`` from rows, some outputs at a time: what every model with a gradient has."""
    point = functional.outputs(inputs)
    count = point[0].numel()
    changes = []
    for start in range(0, count, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, count)

        def some(outputs: Tensor, start: int = start, stop: int = stop) -> SimpleNamespace:
            eye = torch.eye(count, dtype=outputs.dtype, device=outputs.device)[start:stop]
            values = eye.reshape(stop - start, 1, *outputs.shape[1:])
            return SimpleNamespace(values=values.expand(stop - start, *outputs.shape))

        block, _ = captured_at_use(functional, plan, inputs, some)
        rows = JacobianOperator(functional.space, [block]).matvec(samples)
        changes.append(rows.reshape(len(samples), len(point), stop - start))
    return torch.cat(changes, dim=2).reshape(len(samples), *point.shape)


def forward_product(
    functional: FunctionalModel, tangent: dict[str, Tensor], inputs: Inputs
) -> Tensor:
    """``J(x) Δ (B, *out)`` by one pass in forward mode."""
    weights = functional.weights()
    change: Tensor = jvp(lambda w: functional(w, inputs), (weights,), (tangent,))
    return change


def differentiable_change(
    functional: FunctionalModel, delta: Tensor, inputs: Inputs
) -> Tensor | None:
    """``J(x) Δ (B, *out)`` with a graph to the inputs, by the first way that serves; None: by none of them."""
    tangent = functional.space.unflatten(delta)
    ways: tuple[tuple[Product, Callable[[], AbstractContextManager[Any]]], ...] = (
        (forward_product, smooth),
        (partial(double_reverse_product, kept=True), smooth),
    )
    found = (_tried(product, mode, functional, tangent, inputs) for product, mode in ways)
    return next((change for change in found if change is not None), None)


def _tried(
    product: Product,
    mode: Callable[[], AbstractContextManager[Any]],
    functional: FunctionalModel,
    tangent: dict[str, Tensor],
    inputs: Inputs,
) -> Tensor | None:
    """What ``product`` gives, if it gives something with a graph."""
    try:
        with mode(), torch.enable_grad():
            change = product(functional, tangent, inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # an operation without a derivative of that kind, in whatever words
        return None
    return change if change.requires_grad else None


def double_reverse_product(
    functional: FunctionalModel,
    tangent: dict[str, Tensor],
    inputs: Inputs,
    *,
    kept: bool = False,
) -> Tensor:
    """``J(x) Δ (B, *out)`` by two reverse passes; ``kept``: with the graph behind it."""
    leaves = functional.weights(requires_grad=True)
    with torch.enable_grad():
        f = functional(leaves, inputs)
        dummy = torch.zeros_like(f, requires_grad=True)
        pulled = torch.autograd.grad(
            f, list(leaves.values()), dummy, create_graph=True, allow_unused=True
        )
        along = sum(
            ((g * tangent[n]).sum() for n, g in zip(leaves, pulled, strict=True) if g is not None),
            start=f.new_zeros(()),
        )
        return torch.autograd.grad(along, dummy, create_graph=kept)[0]


def _products() -> tuple[tuple[Product, Callable[[], AbstractContextManager[Any]]], ...]:
    """Ways to differentiate along a weight change, the cheapest first; rows serve where none of them does."""
    return (
        (forward_product, nullcontext),
        (double_reverse_product, nullcontext),
        (forward_product, Mathematical),
        (double_reverse_product, Mathematical),
    )


def sampled_outputs(
    functional: FunctionalModel,
    samples: Tensor,
    inputs: Inputs,
    where: str = "the inputs",
    scale: float = 1.0,
    *,
    proved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (B, *out)`` and ``f(θ̂ + scale Δ_s, x) (S, B, *out)``: the network itself, re-weighted.

    Args:
        proved: these very examples were shown to be functions of themselves.
    """
    if proved:
        inputs = functional.batch(inputs)
        point = functional.outputs(inputs, where)
    else:
        inputs, point = separate_at_use(functional, inputs, where)
    functional.expect_shape(inputs, point.shape[1:], where)
    weights = functional.weights()
    out = []
    with torch.no_grad():
        for delta in samples:
            changes = functional.space.unflatten(delta).items()
            moved = {n: torch.add(weights[n], d, alpha=scale) for n, d in changes}
            out.append(functional(moved, inputs))
    return point, torch.stack(out)


def state_dicts(
    model: nn.Module, space: ParameterSpace, samples: Tensor
) -> Iterator[dict[str, Tensor]]:
    """``θ̂ + Δ_s`` for each of ``samples (S, P)``, as a state dict of the whole model."""
    canonical = {id(p): n for n, p in model.named_parameters()}
    theta = space.current(model)
    for delta in samples:
        moved = {n: theta[n] + d for n, d in space.unflatten(delta).items()}
        out = {}
        for key, value in model.state_dict(keep_vars=True).items():
            name = canonical.get(id(value), key)
            here = isinstance(value, Tensor) and name in moved
            # In half precision, rounding would move a sample by more than it may: those are given as float32.
            out[key] = moved[name] if here else value.detach().clone()
        yield out
