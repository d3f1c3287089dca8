"""Alternating projections once more, compiled with JAX: the framework that the paper's authors work in.

The same recurrence as :func:`benchmarks.published.alternating_projections`, written from the paper for
one network (LeNet), so that no figure rests on how PyTorch runs many small operations one by one.

Weights, samples and products with the network are in the dtype of the images (float32 in the benchmark);
the inverses are computed and applied in float64 unless ``inverses="float32"`` asks for JAX's default,
which cannot tell eigenvalues below a millionth of the largest from rounding.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import published
from nullbayes.demo.models import lenet
from nullbayes.demo.running import Clock

#: LeNet's weights in ``nullbayes.demo.models.lenet``, in the order of its state dict
SHAPES = {
    "0.weight": (6, 1, 5, 5), "0.bias": (6,),
    "3.weight": (16, 6, 5, 5), "3.bias": (16,),
    "7.weight": (120, 400), "7.bias": (120,),
    "9.weight": (84, 120), "9.bias": (84,),
    "11.weight": (10, 84), "11.bias": (10,),
}  # fmt: skip
#: eigenvalues below this share of the largest are rounding, and left out of the inverse
CUTOFFS = {"float64": published.CUTOFF, "float32": 1e-6}


def require_jax() -> ModuleType:
    """JAX with float64 switched on (its arrays say their dtype here, so nothing else changes)."""
    try:
        import jax
    except ImportError as error:
        raise ImportError(
            "the compiled alternating projections need JAX; install it with "
            "`pip install -c constraints.txt 'nullbayes[bench]'`."
        ) from error
    jax.config.update("jax_enable_x64", True)
    return jax


def _convolution(images: Any, weight: Any, bias: Any, padding: int) -> Any:
    """5 × 5 convolution of ``(B, H, W, C)`` as five matrix products over shifted rows of the image.

    Its derivatives by the weights are matrix products too; those of XLA's own convolution, once for
    each sample, are grouped convolutions: three times slower on a CPU.
    """
    import jax.numpy as jnp

    k, out = weight.shape[-1], bias
    images = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = images.shape[1] - k + 1, images.shape[2] - k + 1
    beside = jnp.concatenate([images[:, :, j : j + width] for j in range(k)], -1)  # (B, H, W', k·C)
    for i in range(k):
        rows = beside[:, i : i + height].reshape(-1, beside.shape[-1])
        out = out + rows @ weight[:, :, i].transpose(2, 1, 0).reshape(rows.shape[1], -1)
    return out.reshape(len(images), height, width, -1)


def _halved(images: Any) -> Any:
    b, h, w, c = images.shape
    return images.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def outputs(theta: Any, images: Any) -> Any:
    """``(B, 10)`` of LeNet with flat weights ``theta (61,706,)``, for ``images (B, 1, 28, 28)``."""
    import jax.numpy as jnp

    weights, start = [], 0
    for shape in SHAPES.values():
        size = math.prod(shape)
        weights.append(theta[start : start + size].reshape(shape))
        start += size
    w1, b1, w2, b2, w3, b3, w4, b4, w5, b5 = weights
    x = _halved(jnp.tanh(_convolution(images.transpose(0, 2, 3, 1), w1, b1, 2)))
    x = _halved(jnp.tanh(_convolution(x, w2, b2, 0)))
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    x = jnp.tanh(x @ w3.T + b3)
    x = jnp.tanh(x @ w4.T + b4)
    return x @ w5.T + b5


def _root(logits: Any) -> Any:
    """``(B, O, O-1)`` with ``L Lᵀ = diag(p) - ppᵀ``, by eigendecomposition in float64."""
    import jax
    import jax.numpy as jnp

    p = jax.nn.softmax(logits.astype(jnp.float64), axis=1)
    hessian = p[:, :, None] * jnp.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]
    values, vectors = jnp.linalg.eigh(hessian)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    return root[:, :, 1:].astype(logits.dtype)


def _prepare(theta: Any, batches: Any, present: Any, precision: str) -> tuple[Any, Any]:
    """Roots ``(K, B, O, O-1)`` and inverses ``(K, B(O-1), B(O-1))`` of the ``K`` mini-batches."""
    import jax
    import jax.numpy as jnp

    def one(batch: tuple[Any, Any]) -> tuple[Any, Any]:
        images, mask = batch
        # Examples that only fill up the last mini-batch get rows of zeros, which the cut-off drops.
        root = _root(outputs(theta, images)) * mask[:, None, None]

        def rows(image: Any, factor: Any) -> Any:
            pull = jax.vjp(lambda t: outputs(t, image[None])[0], theta)[1]
            return jax.vmap(lambda c: pull(c)[0])(factor.T)

        a = jax.vmap(rows)(images, root).reshape(-1, len(theta)).astype(precision)
        values, vectors = jnp.linalg.eigh(a @ a.T)
        keep = values > CUTOFFS[precision] * values.max()
        inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
        return root, (vectors * inverse) @ vectors.T

    return jax.lax.map(one, (batches, present))


def _cycle(
    theta: Any, batches: Any, roots: Any, inverses: Any, samples: Any, accelerated: bool
) -> Any:
    """One pass over all mini-batches: ``samples (S, P)`` projected onto each null space in turn."""
    import jax
    import jax.numpy as jnp

    def step(samples: Any, batch: tuple[Any, Any, Any]) -> tuple[Any, None]:
        images, root, inverse = batch

        def f(t: Any) -> Any:
            return outputs(t, images)

        def project(v: Any) -> Any:
            moved = jax.jvp(f, (theta,), (v,))[1]
            u = inverse @ jnp.einsum("bo,boc->bc", moved, root).reshape(-1).astype(inverse.dtype)
            u = u.reshape(root.shape[0], root.shape[2]).astype(v.dtype)
            return v - jax.vjp(f, theta)[1](jnp.einsum("boc,bc->bo", root, u))[0]

        return jax.vmap(project)(samples), None

    projected, _ = jax.lax.scan(step, samples, (batches, roots, inverses))
    if not accelerated:
        return projected
    change = projected.astype(jnp.float64) - samples.astype(jnp.float64)
    length = (change**2).sum(1)
    along = -(samples.astype(jnp.float64) * change).sum(1)
    t = jnp.where(length > 0, along / jnp.where(length > 0, length, 1), 1.0)
    return (samples + t[:, None] * change).astype(samples.dtype)


def alternating_projections(
    weights: dict[str, Tensor],
    x: Tensor,
    noise: Tensor,
    cycles: int,
    batch: int = 16,
    *,
    accelerated: bool = False,
    inverses: str = "float64",
    watch: published.Watch | None = None,
    max_seconds: float = math.inf,
) -> tuple[Tensor, Clock]:
    """As :func:`benchmarks.published.alternating_projections`, for LeNet's state dict ``weights``.

    Compilation is a stage of its own on the clock, and no part of the seconds that ``watch`` is told
    and that ``max_seconds`` limits.
    """
    jax = require_jax()
    import jax.numpy as jnp

    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != SHAPES:
        raise ValueError(f"expected the state dict of LeNet, {SHAPES}; got {found}.")
    theta = jnp.asarray(torch.cat([weights[n].reshape(-1) for n in SHAPES]).to(x).numpy())
    batch = min(batch, len(x))
    missing = -len(x) % batch
    padded = np.concatenate([x.numpy(), np.zeros((missing, *x.shape[1:]), x.numpy().dtype)])
    batches = jnp.asarray(padded.reshape(-1, batch, *x.shape[1:]))
    present = jnp.asarray((np.arange(len(padded)) < len(x)).reshape(-1, batch).astype(padded.dtype))
    samples = jnp.asarray(noise.to(x).numpy())

    clock = Clock()
    prepare = jax.jit(_prepare, static_argnums=3)
    prepare = prepare.lower(theta, batches, present, inverses).compile()
    shapes = jax.eval_shape(lambda *a: _prepare(*a, inverses), theta, batches, present)
    cycle = jax.jit(_cycle, static_argnums=5)
    cycle = cycle.lower(theta, batches, *shapes, samples, accelerated).compile()
    clock.lap("compilation")
    roots, inverted = jax.block_until_ready(prepare(theta, batches, present))
    clock.lap("precomputation")

    def advance(samples: Any) -> Any:
        return jax.block_until_ready(cycle(theta, batches, roots, inverted, samples))

    samples = published.run_cycles(advance, samples, to_torch, clock, cycles, watch, max_seconds)
    return samples, clock


def to_torch(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def difference_from_torch(
    weights: dict[str, Tensor],
    x: Tensor,
    noise: Tensor,
    cycles: int = 2,
    accelerated: bool = False,
) -> float:
    """Largest ``‖Δ_jax - Δ_torch‖ / ‖Δ_torch‖`` after ``cycles``, both in the dtype of ``x``.

    In float64 only rounding sets the two apart; in float32 the rows themselves differ by rounding,
    and directions near the cut-off turn with them.
    """
    model = lenet(10).to(x.dtype).eval()
    model.load_state_dict(weights)
    noise = noise.to(x)
    theirs = published.alternating_projections(model, x, noise, cycles, accelerated=accelerated)[0]
    ours = alternating_projections(weights, x, noise, cycles, accelerated=accelerated)[0]
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())
