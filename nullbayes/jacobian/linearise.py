"""Functions drawn from a posterior: what its weight samples do to the outputs at given inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nullbayes.jacobian.capture.batches import CAPTURE_BYTES, examples_per_capture
from nullbayes.jacobian.capture.capture import capture
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace

Centre = Callable[[Tensor], Tensor]

# Up to this many outputs per sample, reverse mode (all rows at once) is cheaper than one
# forward-mode pass for each sample.
REVERSE_OUTPUTS_PER_SAMPLE = 2


def first_output(functional: FunctionalModel, inputs: Inputs, where: str = "the inputs") -> Tensor:
    """``f(θ̂, x) (1, *out)`` of the first example alone, for its shape; errors speak of the batch."""
    try:
        return functional.outputs(take(inputs, 0, 1), where)
    except Exception:
        functional.outputs(inputs, where)
        raise


@contextmanager
def blaming_inputs(functional: FunctionalModel, inputs: Inputs, where: str) -> Iterator[None]:
    """Errors within it are said to be those of the inputs where a plain forward pass fails on them too."""
    try:
        yield
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
    """

    def every_output(point: Tensor) -> SimpleNamespace:
        """One cotangent per output number: ``(O, B, *out)``."""
        count = point[0].numel()
        eye = torch.eye(count, dtype=point.dtype, device=point.device)
        values = centre(eye.reshape(count, 1, *point.shape[1:]))
        return SimpleNamespace(values=values.expand(count, *point.shape), point=point)

    room = max(CAPTURE_BYTES, vectors.nbytes)
    size, step = batch_size(inputs), examples_per_capture(functional, plan, outputs, room)
    for start in range(0, size, step):
        piece = take(inputs, start, min(start + step, size))
        block, made = capture(functional, plan, piece, every_output, scales)
        yield made.point, JacobianOperator(functional.space, [block])


def linearised_outputs(
    functional: FunctionalModel,
    plan: CapturePlan,
    samples: Tensor,
    inputs: Inputs,
    where: str = "the inputs",
) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (B, *out)`` and ``J(x) Δ_s (S, B, *out)`` for ``samples (S, P)``."""
    shape = first_output(functional, inputs, where)[0].shape
    if shape.numel() > REVERSE_OUTPUTS_PER_SAMPLE * len(samples):
        return functional.outputs(inputs, where), forward_mode(functional, plan, samples, inputs)
    points, changes = [], []
    with blaming_inputs(functional, inputs, where):
        for point, rows in output_rows(functional, plan, inputs, shape.numel(), samples):
            points.append(point)
            changes.append(rows.matvec(samples).reshape(len(samples), -1, *shape))
    return torch.cat(points), torch.cat(changes, dim=1)


def forward_mode(
    functional: FunctionalModel, plan: CapturePlan, samples: Tensor, inputs: Inputs
) -> Tensor:
    """``J(x) Δ_s (S, B, *out)`` one sample at a time, whatever the number of outputs.

    Forward-mode differentiation where every operation of the model has it; otherwise two reverse
    passes (the derivative of ``wᵀJ`` by ``w``), which every differentiable model has. A batch is taken
    in pieces: a pass holds a multiple of the model's own activations.
    """
    product, pieces = _forward, []
    size, step = batch_size(inputs), examples_per_capture(functional, plan, 1)
    for start in range(0, size, step):
        piece, out = take(inputs, start, min(start + step, size)), []
        for delta in samples:
            tangent = functional.space.unflatten(delta)
            try:
                change = product(functional, tangent, piece)
            except (NotImplementedError, RuntimeError):
                if product is _double_reverse:
                    raise
                product = _double_reverse  # from now on: what one sample lacks, they all lack
                change = product(functional, tangent, piece)
            out.append(change.detach())
        pieces.append(torch.stack(out))
    return torch.cat(pieces, dim=1)


def _forward(functional: FunctionalModel, tangent: dict[str, Tensor], inputs: Inputs) -> Tensor:
    weights = functional.weights()
    change: Tensor = torch.func.jvp(lambda w: functional(w, inputs), (weights,), (tangent,))[1]
    return change


def _double_reverse(
    functional: FunctionalModel, tangent: dict[str, Tensor], inputs: Inputs
) -> Tensor:
    leaves = functional.weights(requires_grad=True)
    with torch.enable_grad():
        f = functional(leaves, inputs)
        dummy = torch.zeros_like(f, requires_grad=True)
        pulled = torch.autograd.grad(f, list(leaves.values()), dummy, create_graph=True)
        along = sum(
            ((g * tangent[n]).sum() for n, g in zip(leaves, pulled, strict=True)),
            start=f.new_zeros(()),
        )
        return torch.autograd.grad(along, dummy)[0]


def sampled_outputs(
    functional: FunctionalModel,
    samples: Tensor,
    inputs: Inputs,
    where: str = "the inputs",
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (B, *out)`` and ``f(θ̂ + scale Δ_s, x) (S, B, *out)``: the network itself, re-weighted."""
    point = functional.outputs(inputs, where)
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
            out[key] = moved[name] if name in moved else value.detach().clone()
        yield out
