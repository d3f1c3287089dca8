"""A loss of the user's own, as a function of whatever the model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from nullbayes.common.deprecation import formerly_positional
from nullbayes.errors import InputError, ModelError, NullBayesError
from nullbayes.likelihood.base import Likelihood, Moments, resolve_likelihood
from nullbayes.likelihood.helpers import (
    check_finite,
    diagonal_factor,
    epistemic_variance,
    to_float64,
)
from nullbayes.likelihood.output_hessian import OutputHessian, detached
from nullbayes.model.batch import plain, take, to_device
from nullbayes.model.structure import Layouts

LossFunction = Callable[[Any, Any], Tensor]

# Output elements up to which an example's Hessian is decomposed whole.
DENSE_ELEMENTS = 256
# Elements of a search space that the leading directions of a piece of a batch may take (128 MB).
_SPACE = 1 << 24
_CHECKED_EXAMPLES = 3


def resolve_loss(
    likelihood: str | Likelihood | LossFunction, loss: LossFunction | None, default: str
) -> Likelihood:
    """The likelihood that ``likelihood=`` and ``loss=`` of a posterior ask for.

    Raises:
        InputError: both are given, or neither a name, nor an object, nor a callable.
    """
    if loss is not None:
        if likelihood != default:
            raise InputError(
                f"both `likelihood` ({likelihood!r}) and `loss` are given; they mean the same. Pass one of them."
            )
        if isinstance(loss, type) or not callable(loss):
            raise InputError(
                f"`loss` is {loss!r}; expected a callable `loss(outputs, targets) -> (B,)`, one value per example."
            )
        likelihood = loss
    known = isinstance(likelihood, (str, Likelihood, type))
    if not known and callable(likelihood):
        return CallableLoss(likelihood)
    return resolve_likelihood(likelihood)  # type: ignore[arg-type]


class CallableLoss(Likelihood):
    """``function(outputs, targets) -> (B,)`` as a likelihood: one loss per example, in nats if it is one.

    The function gets the model's outputs in the structure in which the model returns them, and the targets of
    the batch (the inputs, where a batch has none). Elsewhere outputs are one flat tensor ``(B, D)``, or
    ``(B, *out)`` where the model returns a lone tensor.

    There is no observation model behind it, so a prediction's ``total`` is its ``epistemic`` variance, and its
    ``aleatoric`` one is zero.
    """

    name = "callable"
    score_name = "loss"
    describes_targets = False
    inputs_are_targets = True

    def __init__(self, function: LossFunction) -> None:
        self.function = function
        self.layouts: Layouts = Layouts()
        # Output shapes for which examples were found separate.
        self._separate: set[tuple[int, ...]] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> CallableLoss:
        # A bound method would take its object along, and that may be the model.
        return self

    # -- the loss --------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """The function's values ``(B,)`` for flat ``outputs``. Raises `InputError` for any other shape."""
        losses: object = self.function(self.layouts.unflatten(outputs), plain(targets))
        if not isinstance(losses, Tensor):
            raise InputError(
                f"the loss {self._called} returned {type(losses).__name__}, expected a tensor of shape "
                f"({len(outputs)},): one value per example."
            )
        if losses.shape != outputs.shape[:1]:
            over = "reduced over the batch" if losses.ndim == 0 else "not one value per example"
            raise InputError(
                f"the loss {self._called} returned shape {tuple(losses.shape)} for {len(outputs)} examples: {over}. "
                'Compute it with `reduction="none"` and sum over all axes but the first, e.g. '
                "`loss.flatten(1).sum(1)`."
            )
        return losses

    def validate(self, outputs: Tensor, targets: Any, where: str) -> None:
        """Finite outputs, one finite and differentiable loss per example that depends on that example alone."""
        if not outputs.is_floating_point():
            raise InputError(
                f"{where}: the outputs have dtype {outputs.dtype}, which has no derivative; expected real floating "
                "point: raw logits or other outputs before any argmax or rounding (`forward=` may pick them)."
            )
        if not len(outputs):
            raise InputError(f"{where}: no examples. Leave empty batches out of the loader.")
        check_finite(outputs, f"{where}: the outputs", "Check the weights and the inputs.")
        try:
            self._check(outputs.detach(), self.prepare_targets(outputs, targets), where)
        except (NullBayesError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            layout = self.layouts.layout(outputs)
            got = f"shape {tuple(outputs.shape)}" if layout is None else layout.describe()
            raise InputError(
                f"{where}: the loss {self._called} failed: {type(error).__name__}: {error}. It is called with the "
                f"model's outputs ({got}) and the targets ({_described(targets)})."
            ) from error

    def _check(self, outputs: Tensor, targets: Any, where: str) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            losses = self.loss(outputs.clone().requires_grad_(), detached(targets))
        if not losses.requires_grad:
            raise InputError(
                f"{where}: the loss {self._called} cannot be differentiated by the model's outputs; look for "
                "`.detach()`, `.item()`, `torch.no_grad()`, argmax or integer conversions in it, or for an output "
                "that it does not use."
            )
        losses = losses.detach()
        check_finite(losses, f"{where}: the losses", "Guard logarithms and divisions in the loss.")
        shape = (min(len(outputs), 2), *outputs.shape[1:])
        if shape not in self._separate:
            self._check_separate(outputs, targets, losses, where)
            self._separate.add(shape)

    def _check_separate(self, outputs: Tensor, targets: Any, losses: Tensor, where: str) -> None:
        """An example's loss must be the same again, alone, and whatever the others' outputs are."""
        allowed = 2e4 * torch.finfo(losses.dtype).eps * losses.abs().max()
        with torch.no_grad():
            again = self.loss(outputs, targets)
            if bool(((again - losses).abs() > allowed).any()):
                raise InputError(
                    f"{where}: the loss {self._called} gave other values for the same outputs: it draws random "
                    'numbers. Draw them in the model (or in `forward=`), where `randomness="frozen"` freezes them.'
                )
            few = min(len(outputs), _CHECKED_EXAMPLES)
            alone = torch.cat(
                [
                    self.loss(outputs[n : n + 1], take(targets, n, n + 1, len(outputs)))
                    for n in range(few)
                ]
            )
            moved = outputs.clone()
            moved[0] += outputs[0].abs().mean().clamp_min(1e-3)
            others = self.loss(moved, targets)
        mixed = bool(((alone - losses[:few]).abs() > allowed).any())
        if mixed or not bool(((others - losses)[1:].abs() <= allowed).all()):
            raise InputError(
                f"{where}: the loss {self._called} mixes the examples of a batch: an example's value changes with the "
                "others or with their number. Each entry may depend on its own example alone: no mean over the batch, "
                "no batch statistics, no contrast between examples."
            )

    def check_reach(self, outputs: Tensor, targets: Any) -> None:
        """Raise `ModelError` where the loss uses only outputs that are cut off from the weights."""
        missed = self.layouts.unreached(outputs)
        if not missed:
            return
        gradient = self.loss_gradient(outputs, targets)
        cut = torch.cat([gradient[:, leaf.start : leaf.stop] for leaf in missed], dim=1)
        if bool((cut != 0).any()) and bool(gradient.count_nonzero() == cut.count_nonzero()):
            raise ModelError(
                f"the loss {self._called} uses only outputs that do not depend on the weights by any path that can be "
                f"differentiated: {[leaf.path for leaf in missed]}. Look for `.detach()`, `torch.no_grad()` or integer "
                "conversions in the forward pass."
            )

    @property
    def _called(self) -> str:
        return f"`{_name(self.function)}`"

    def prepare_targets(self, outputs: Tensor, targets: Any) -> Any:
        """All tensors of the targets on the outputs' device."""
        return to_device(targets, outputs.device)

    # -- derivatives -----------------------------------------------------------------------------

    def hessian_factor(self, outputs: Tensor, targets: Any) -> Tensor:
        """As for any likelihood, but with two products where the Hessian turns out to be diagonal."""
        diagonal = OutputHessian(self.loss, outputs, targets).diagonal()
        if diagonal is not None:
            return diagonal_factor(diagonal.clamp_min(0).sqrt().reshape(outputs.shape))
        return super().hessian_factor(outputs, targets)

    def leading_factor(
        self, outputs: Tensor, targets: Any, directions: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Exact for a diagonal Hessian; by Krylov iteration for a large one; None: small enough to decompose."""
        width = outputs[0].numel()
        step = max(1, _SPACE // (width * 8 * (directions + 4)))
        parts = []
        for start in range(0, len(outputs), step):
            stop = min(start + step, len(outputs))
            some = OutputHessian(
                self.loss, outputs[start:stop], take(targets, start, stop, len(outputs))
            )
            found = _leading(some, min(directions, width))
            if found is None:
                return None
            parts.append(found)
        vectors, values, traces = (torch.cat(part) for part in zip(*parts, strict=True))
        values = values.clamp_min(0)
        scaled = (vectors * values.sqrt().unsqueeze(-1)).transpose(0, 1).to(outputs)
        return scaled.reshape(-1, *outputs.shape), values, torch.maximum(traces, values.sum(1))

    def divergence(self, point: Tensor, samples: Tensor, targets: Any) -> Tensor:
        """Second order: half the change through the loss's Hessian, over the number of target elements."""
        hessian = OutputHessian(self.loss, point, targets)
        changes = (samples - point).reshape(len(samples), *hessian.shape)
        values = [(hessian.product(change) * change).sum(1) for change in changes]
        elements = [t.numel() for t in tree_flatten(targets)[0] if isinstance(t, Tensor)]
        observed = max(1, sum(elements) // len(point))
        return torch.stack(values).clamp_min(0) / (2 * observed)

    # -- predictions -----------------------------------------------------------------------------

    @formerly_positional("linearised")
    def moments(self, samples: Tensor, point: Tensor, *, linearised: bool) -> Moments:
        """Mean and epistemic variance of the flat outputs."""
        variance = epistemic_variance(samples, point, linearised=linearised)
        mean = point if linearised else samples.mean(0)
        return Moments(mean, variance, variance, torch.zeros_like(variance), variance)

    def structured(self, values: Tensor) -> Any:
        """Flat outputs ``(*lead, D)`` in the model's own structure."""
        return self.layouts.unflatten(values)

    def correct(self, mean: Tensor, targets: Any) -> Tensor:
        """The losses ``(B,)``."""
        return self.loss(mean, targets)

    def score_draws(
        self, samples: Tensor, point: Tensor, *, linearised: bool, targets: Any
    ) -> tuple[float, int]:
        """Losses of the samples themselves: that of their mean would say nothing of their spread."""
        total = sum(float(to_float64(self.loss(sample, targets)).sum()) for sample in samples)
        return total / len(samples), len(point)

    # -- storage ---------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The function's name: code is not stored."""
        return {"name": self.name, "function": _name(self.function)}


def _leading(hessian: OutputHessian, directions: int) -> tuple[Tensor, Tensor, Tensor] | None:
    diagonal = hessian.diagonal()
    if diagonal is None:
        return None if hessian.shape[1] <= DENSE_ELEMENTS else hessian.leading(directions)
    diagonal = to_float64(diagonal).clamp_min(0)
    values, index = diagonal.topk(directions, dim=1)
    vectors = torch.zeros(*index.shape, diagonal.shape[1], dtype=values.dtype, device=values.device)
    return vectors.scatter_(2, index.unsqueeze(2), 1.0), values, diagonal.sum(1)


def _name(function: object) -> str:
    if hasattr(function, "__qualname__"):
        return f"{getattr(function, '__module__', '')}.{function.__qualname__}"
    return type(function).__name__


def _described(value: Any) -> str:
    """Nested targets by shape."""
    shapes = tree_map(
        lambda t: tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__, value
    )
    return f"{shapes}"
