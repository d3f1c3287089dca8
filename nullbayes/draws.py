"""Functions drawn from a posterior: what its weight samples do to the outputs at given inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nullbayes.jacobian.build import output_operators
from nullbayes.jacobian.capture import CapturePlan
from nullbayes.jacobian.functional import FunctionalModel, Inputs
from nullbayes.jacobian.parameters import ParameterSpace

# Up to this many outputs per sample, reverse mode (all rows at once) is cheaper than one
# forward-mode pass for each sample.
REVERSE_OUTPUTS_PER_SAMPLE = 2


def generator_for(seed: int, index: int) -> torch.Generator:
    """The random stream of sample ``index``: independent of all others and of how many there are."""
    words = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def standard_normal(
    seed: int, indices: range, columns: int, rows: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """``v (S, columns)`` in the dtype of ``like`` and ``ξ (S, rows)`` float64, on its device."""
    v = torch.empty(len(indices), columns, dtype=like.dtype)
    noise = torch.empty(len(indices), rows, dtype=torch.float64)
    for i, index in enumerate(indices):
        generator = generator_for(seed, index)
        v[i].normal_(generator=generator)
        noise[i].normal_(generator=generator)
    return v.to(like.device), noise.to(like.device)


def linearised(
    functional: FunctionalModel,
    plan: CapturePlan,
    samples: Tensor,
    inputs: Inputs,
    where: str = "the inputs",
) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (B, *out)`` and ``J(x) Δ_s (S, B, *out)`` for ``samples (S, P)``."""
    point = functional.outputs(inputs, where)
    outputs = point[0].numel()
    if outputs > REVERSE_OUTPUTS_PER_SAMPLE * len(samples):
        return point, forward_mode(functional, samples, inputs)
    parts = [
        operator.matvec(samples).reshape(len(samples), -1, *point.shape[1:])
        for operator in output_operators(functional, plan, inputs, outputs)
    ]
    return point, torch.cat(parts, dim=1)


def forward_mode(functional: FunctionalModel, samples: Tensor, inputs: Inputs) -> Tensor:
    """``J(x) Δ_s (S, B, *out)`` one sample at a time, whatever the number of outputs.

    Forward-mode differentiation where every operation of the model has it; otherwise two reverse
    passes (the derivative of ``wᵀJ`` by ``w``), which every differentiable model has.
    """
    product, out = _forward, []
    for delta in samples:
        tangent = functional.space.unflatten(delta)
        try:
            change = product(functional, tangent, inputs)
        except (NotImplementedError, RuntimeError):
            if product is _double_reverse:
                raise
            product = _double_reverse  # for all samples: what the first one lacks, they all lack
            change = product(functional, tangent, inputs)
        out.append(change.detach())
    return torch.stack(out)


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


def sampled(
    functional: FunctionalModel, samples: Tensor, inputs: Inputs, where: str = "the inputs"
) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (B, *out)`` and ``f(θ̂ + Δ_s, x) (S, B, *out)``: the network itself, re-weighted."""
    point = functional.outputs(inputs, where)
    weights = functional.weights()
    out = []
    with torch.no_grad():
        for delta in samples:
            moved = {n: weights[n] + d for n, d in functional.space.unflatten(delta).items()}
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
