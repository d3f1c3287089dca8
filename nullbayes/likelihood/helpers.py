"""Pieces that the likelihoods share: checks of batches, means of logarithms, entropies, diagonal factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nullbayes.common.deprecation import formerly_positional
from nullbayes.errors import InputError, NonFiniteError


def to_float64(tensor: Tensor) -> Tensor:
    """Float64 on the same device, or on the CPU for Apple's MPS, which has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def float64_setting(value: object, name: str) -> Tensor:
    """A number, sequence or tensor given by the user as a float64 CPU tensor of its own.

    Raises `InputError` for anything else. Python floats must not pass through torch's default dtype:
    float32 would round them.
    """
    try:
        if isinstance(value, Tensor):
            return value.detach().cpu().to(torch.float64).clone()
        return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} is {value!r}, expected a number, a sequence of numbers or a tensor: {error}."
        ) from None


def log_mean_exp(values: Tensor) -> Tensor:
    """``log mean exp`` over the first axis."""
    return values.logsumexp(0) - math.log(values.shape[0])


def require_samples(samples: Tensor, least: int) -> None:
    """Raise `InputError` where fewer samples came than the estimate needs."""
    if samples.shape[0] < least:
        raise InputError(
            f"got {samples.shape[0]} samples of the outputs, expected at least {least}. Fit the posterior "
            f"with a larger `num_samples`."
        )


def mirrored(samples: Tensor, point: Tensor) -> Tensor:
    """Linearised samples ``(S, B, *out)`` and their mirror images about ``point``: ``(2S, B, *out)``.

    A Gaussian is symmetric, so both are samples; together their mean is ``point`` exactly, and what is odd in the
    weights drops out of every average over them (antithetic variates, Hammersley & Morton 1956). A mean prediction
    of few samples then does not wander from that of the trained network by chance: with two classes, the more
    probable one always stays the same.
    """
    return torch.cat([samples, 2 * point - samples])


@formerly_positional("linearised")
def epistemic_variance(samples: Tensor, point: Tensor, *, linearised: bool) -> Tensor:
    """Variance of ``samples`` ``(S, B, *out)`` over S: ``(B, *out)``, unbiased either way.

    Linearised samples have the known mean ``point``, so the squares are divided by S; otherwise the mean
    is estimated and they are divided by S - 1. Raises `InputError` for too few samples.
    """
    require_samples(samples, 1 if linearised else 2)
    return (samples - point).square().mean(0) if linearised else samples.var(0)


def entropy_terms(log_p: Tensor) -> Tensor:
    """``-p log p`` elementwise, 0 where p is (a masked class gives 0 · inf = NaN)."""
    p = log_p.exp()
    return torch.where(p > 0, -p * log_p, torch.zeros_like(p))


def diagonal_factor(roots: Tensor) -> Tensor:
    """Factor of a diagonal Hessian from its roots ``(B, *out)``: ``(D, B, *out)``."""
    batch, width = roots.shape[0], math.prod(roots.shape[1:])
    factor = roots.new_zeros(width, batch, width)
    factor.diagonal(dim1=0, dim2=2).copy_(roots.reshape(batch, width))
    return factor.reshape(width, *roots.shape)


def reshape_column(outputs: Tensor, targets: Tensor) -> Tensor:
    """Read targets ``(B,)`` for outputs ``(B, 1)``, and the reverse, as the same thing."""
    column = {tuple(outputs.shape), tuple(targets.shape)} == {
        tuple(outputs.shape[:1]),
        (*outputs.shape[:1], 1),
    }
    return targets.reshape(outputs.shape) if column else targets


def check_finite(tensor: Tensor, what: str, mend: str) -> None:
    """Raise `NonFiniteError` naming the first example with NaN or infinity."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = (~finite).reshape(tensor.shape[0], -1).any(1).nonzero()[:, 0]
    raise NonFiniteError(
        f"{what} hold NaN or infinity in {bad.numel()} of {tensor.shape[0]} examples (first: example "
        f"{int(bad[0])}), expected finite numbers. {mend}"
    )


def check_batch(outputs: Tensor, targets: Tensor, where: str) -> None:
    """The checks that every likelihood needs: tensors, a shared batch axis, finite numbers."""
    for role, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise InputError(
                f"{where}: the {role} are a {type(value).__name__}, expected a torch.Tensor. Pass "
                f"`forward=` to pick the output tensor, or let the loader collate tensors."
            )
    if not outputs.is_floating_point():
        raise InputError(
            f"{where}: the outputs have dtype {outputs.dtype}, expected real floating point: raw "
            f"logits or regression outputs, before any argmax or rounding."
        )
    if outputs.ndim < 1 or outputs.numel() == 0:
        raise InputError(
            f"{where}: the outputs have shape {tuple(outputs.shape)}, expected (B, ...) with at least "
            f"one example. Leave empty batches out of the loader."
        )
    if targets.ndim < 1 or targets.shape[0] != outputs.shape[0]:
        raise InputError(
            f"{where}: outputs of shape {tuple(outputs.shape)} but targets of shape "
            f"{tuple(targets.shape)}; expected one target per example, {outputs.shape[0]} in the first "
            f"axis. The batch has to be the first axis of both."
        )
    check_finite(
        outputs,
        f"{where}: the outputs",
        "Check the weights and the inputs; write masked logits as a large negative number, not -inf.",
    )
    if targets.is_complex():
        raise InputError(f"{where}: the targets have dtype {targets.dtype}, expected real numbers.")
    if targets.is_floating_point():
        check_finite(targets, f"{where}: the targets", "Drop or impute the missing targets.")


def check_same_shape(
    outputs: Tensor, targets: Tensor, where: str, advice: Callable[[], str]
) -> None:
    """Raise `InputError` unless the (prepared) targets have the shape of the outputs."""
    if targets.shape != outputs.shape:
        raise InputError(
            f"{where}: outputs of shape {tuple(outputs.shape)} but targets of shape "
            f"{tuple(targets.shape)}; expected the same shape. {advice()}"
        )


def without_rounding(values: Tensor, vectors: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues ``(B, D)`` of ``matrix (B, D, D)``, those zero that are negative or may be nothing but rounding.

    An entry that was computed in ``dtype`` is off by eps of its size, so ``vᵀ H v`` by eps of ``|v|ᵀ |H| |v|``: for an
    eigenvector that lies in a few outputs, of the size of their entries alone, however large others are. (Entries
    that are what a cancellation left, as for a confident prediction, are off by more; that cannot be told from them.)

    Args:
        vectors: ``(B, D, D)``, an eigenvector a column.
    """
    size = vectors.abs()
    reach = (size * (matrix.abs() @ size)).sum(-2)
    width = matrix.shape[-1]
    noise = width * torch.finfo(dtype).eps * reach
    noise = noise + torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return torch.where(values > noise, values, torch.zeros_like(values))
