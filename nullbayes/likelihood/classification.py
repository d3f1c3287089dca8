"""Softmax cross-entropy over classes: integer or soft labels, one position per example or many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.deprecation import formerly_positional
from nullbayes.errors import InputError
from nullbayes.likelihood.base import Likelihood, Moments, register_likelihood
from nullbayes.likelihood.helpers import (
    check_batch,
    entropy_terms,
    epistemic_variance,
    float64_setting,
    log_mean_exp,
    require_samples,
    to_float64,
)
from nullbayes.likelihood.softmax import position_directions, softmax_directions, softmax_factor


@register_likelihood
class Classification(Likelihood):
    """Categorical likelihood of softmax outputs, ``loss = -Σ w_c y_c log p_c``.

    Outputs ``(B, O)``, ``(B, T, O)``, ``(B, O, T)``, ``(B, O, H, W)`` and so on; integer labels of the
    same shape without the class axis, or soft labels of the same shape whose classes sum to one.

    Args:
        class_axis: axis of the classes, counted with the batch axis. Left out, it is the axis (1 or
            the last) that fits the shape of integer labels; where both fit or none are at hand, what
            `validate` saw before, else the last axis of outputs with up to 3 axes and axis 1 beyond.
        weight: one non-negative weight per class, as in `torch.nn.functional.cross_entropy`
            (``reduction="none"``). Weights the loss and its derivatives, not the predictive score.
        ignore_index: positions with this integer label count for nothing: zero loss, gradient and
            Hessian. None: no label is ignored.
    """

    name = "classification"
    score_name = "accuracy"

    def __init__(
        self,
        class_axis: int | None = None,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int | None = -100,
    ) -> None:
        if class_axis == 0:
            raise InputError(
                "class_axis is 0, which is the batch axis; expected 1 (channels first) or -1 (last)."
            )
        self.class_axis = class_axis
        self.ignore_index = ignore_index
        self.weight: Tensor | None = None  # (O,) float64 on the CPU
        if weight is not None:
            self.weight = float64_setting(weight, "weight")
            good = torch.isfinite(self.weight) & (self.weight >= 0)
            if self.weight.ndim != 1 or not bool(good.all()) or not bool((self.weight > 0).any()):
                raise InputError(
                    f"weight is {self.weight.tolist()}, expected one finite number >= 0 per class, not all zero."
                )
        # Class axis by number of output axes, as `validate` saw it: predictions come without targets.
        self._seen_axes: dict[int, int] = {}

    def energy(self, outputs: Tensor) -> Tensor:
        """``-log Σ exp`` over classes (Liu, Wang, Owens, Li 2020)."""
        return -outputs.logsumexp(self._axis(tuple(outputs.shape)))

    # -- the class axis --------------------------------------------------------------------------

    def _axis(self, shape: Sequence[int], targets: Tensor | None = None) -> int:
        """Class axis of outputs of this shape (with the batch axis); raises `InputError` if none."""
        ndim = len(shape)
        if ndim < 2:
            raise InputError(
                f"classification needs outputs with a class axis, (B, O), got {tuple(shape)}. For one "
                f'logit per example use likelihood="binary".'
            )
        if self.class_axis is not None:
            axis = self.class_axis + ndim if self.class_axis < 0 else self.class_axis
            if not 1 <= axis < ndim:
                raise InputError(
                    f"class_axis={self.class_axis} is no class axis of outputs of shape "
                    f"{tuple(shape)}; expected 1..{ndim - 1} or a negative axis that is not the batch."
                )
            return axis
        usual = self._seen_axes.get(ndim, ndim - 1 if ndim <= 3 else 1)
        if targets is None or targets.ndim != ndim - 1:
            return usual
        fits = [a for a in (1, ndim - 1) if tuple(targets.shape) == _without(shape, a)]
        return usual if usual in fits or not fits else fits[0]

    def _remember(self, ndim: int, axis: int, where: str) -> None:
        seen = self._seen_axes.setdefault(ndim, axis)
        if seen != axis:
            raise InputError(
                f"{where}: the labels put the classes on axis {axis} of the outputs, earlier batches "
                f"on axis {seen}. Say which: `Classification(class_axis={axis})`."
            )

    def _flatten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int]:
        """Logits ``(B, T, O)``, labels ``(B, T)`` int64 or ``(B, T, O)`` soft, and the class axis."""
        targets = self.prepare_targets(outputs, targets)
        axis = self._axis(outputs.shape, targets)
        flat = (outputs.shape[0], math.prod(_without(outputs.shape, axis)[1:]))
        logits = outputs.movedim(axis, -1).reshape(*flat, outputs.shape[axis])
        if targets.is_floating_point():
            return logits, targets.movedim(axis, -1).reshape(logits.shape), axis
        return logits, targets.reshape(flat), axis

    def _kept(self, labels: Tensor) -> Tensor:
        """Mask of the integer labels that are not to be ignored, same shape."""
        if self.ignore_index is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return labels != self.ignore_index

    def _weights(self, logits: Tensor) -> Tensor:
        if self.weight is None:
            return logits.new_ones(logits.shape[-1])
        return self.weight.to(logits)

    def _split(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """In-range integer labels ``(B, T)``, and the weight of each position, 0 where ignored."""
        kept = self._kept(labels)
        safe = torch.where(kept, labels, torch.zeros_like(labels))
        return safe, self._weights(logits)[safe] * kept

    # -- targets ---------------------------------------------------------------------------------

    def prepare_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Soft labels in the outputs' dtype, all others as int64; on the outputs' device."""
        dtype = outputs.dtype if targets.is_floating_point() else torch.int64
        return targets.to(device=outputs.device, dtype=dtype)

    def validate(self, outputs: Tensor, targets: Tensor, where: str) -> None:
        check_batch(outputs, targets, where)
        try:
            axis = self._axis(outputs.shape, targets)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        shape, classes = tuple(outputs.shape), outputs.shape[axis]
        if classes < 2:
            raise InputError(
                f"{where}: outputs of shape {shape} have {classes} class on axis {axis}, expected two "
                f'or more. For one logit use likelihood="binary"; if the classes lie on another axis, '
                f"`Classification(class_axis=...)`."
            )
        if self.weight is not None and self.weight.numel() != classes:
            raise InputError(
                f"{where}: the model has {classes} outputs but `weight` has {self.weight.numel()} "
                f"entries; expected one per class."
            )
        if targets.is_floating_point():
            self._validate_soft(outputs, targets, axis, where)
        else:
            self._validate_integer(outputs, targets, axis, where)
        self._remember(outputs.ndim, axis, where)

    def _validate_integer(self, outputs: Tensor, targets: Tensor, axis: int, where: str) -> None:
        shape, classes = tuple(outputs.shape), outputs.shape[axis]
        expected = _without(shape, axis)
        if tuple(targets.shape) != expected:
            if targets.shape == outputs.shape:
                mend = "For one-hot labels pass `targets.argmax(axis)`, or soft labels as floats."
            elif targets.numel() == math.prod(expected):
                mend = f"`targets.reshape({expected})` would fit."
            else:
                mend = "If the classes lie on another axis, `Classification(class_axis=...)`."
            raise InputError(
                f"{where}: outputs of shape {shape} with {classes} classes on axis {axis}, but integer "
                f"labels of shape {tuple(targets.shape)}; expected {expected}. {mend}"
            )
        labels = targets.to(torch.int64)
        labels = labels[self._kept(labels)]
        if labels.numel() == 0:
            return  # every position is ignored: a batch that adds nothing
        low, high = torch.stack(labels.aminmax()).tolist()
        if low >= 0 and high < classes:
            return
        if low < 0:
            found, culprit = f"labels go down to {low}", low
        else:
            found, culprit = f"labels reach {high}", high
        if low == 1 and high == classes:
            mend = "They seem to start at 1: pass `targets - 1`."
        else:
            mend = (
                f"Renumber the labels or change the number of outputs; if {culprit} marks positions "
                f"to leave out, `Classification(ignore_index={culprit})`."
            )
        raise InputError(
            f"{where}: {found}, model has {classes} outputs, expected 0..{classes - 1}. {mend}"
        )

    def _validate_soft(self, outputs: Tensor, targets: Tensor, axis: int, where: str) -> None:
        if targets.shape != outputs.shape:
            raise InputError(
                f"{where}: labels of dtype {targets.dtype} and shape {tuple(targets.shape)} for outputs "
                f"of shape {tuple(outputs.shape)}. Expected integer labels of shape "
                f"{_without(outputs.shape, axis)} (pass `targets.long()`), or soft labels of the "
                f'outputs\' shape. For real-valued targets use likelihood="regression".'
            )
        low = float(targets.min())
        if low < 0:
            raise InputError(
                f"{where}: soft labels go down to {low:.4g}, expected probabilities >= 0. For "
                f'real-valued targets use likelihood="regression"; log-probabilities need `.exp()`.'
            )
        sums = to_float64(targets).sum(axis)
        worst = float(sums.flatten()[(sums - 1).abs().argmax()])
        # Loose enough for labels rounded to their own dtype, tight enough to catch counts and scores.
        if abs(worst - 1) > max(1e-4, 4 * torch.finfo(targets.dtype).eps):
            raise InputError(
                f"{where}: soft labels sum to {worst:.4g} over the {outputs.shape[axis]} classes on "
                f"axis {axis}, expected 1. Normalise them, or pass `Classification(class_axis=...)` if "
                f'the classes lie on another axis; for multi-label targets use likelihood="binary".'
            )

    # -- loss and derivatives --------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, labels, _ = self._flatten(outputs, targets)
        log_p = logits.log_softmax(-1)
        if labels.is_floating_point():
            return -(self._weights(logits) * labels * log_p).sum((1, 2))
        safe, scale = self._split(logits, labels)
        return -(log_p.gather(-1, safe.unsqueeze(-1)).squeeze(-1) * scale).sum(1)

    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``w_y (p - e_y)``, or ``(Σ w_c y_c) p - w y`` for soft labels: ``(B, *out)``, detached."""
        logits, labels, axis = self._flatten(outputs.detach(), targets)
        p = logits.softmax(-1)
        if labels.is_floating_point():
            weighted = self._weights(logits) * labels
            gradient = weighted.sum(-1, keepdim=True) * p - weighted
        else:
            safe, scale = self._split(logits, labels)
            # p_y - 1 as minus the sum of the others: the subtraction cancels for a confident, right
            # prediction and would leave the row without the entry that makes it sum to zero.
            index = safe.unsqueeze(-1)
            others = p.scatter(-1, index, 0)
            gradient = others.scatter(-1, index, -others.sum(-1, keepdim=True))
            gradient = gradient * scale.unsqueeze(-1)
        return _restore(gradient, outputs.shape, axis)

    def position_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, labels, _ = self._flatten(outputs, targets)
        log_p = logits.log_softmax(-1)
        if labels.is_floating_point():
            return -(self._weights(logits) * labels * log_p).sum(2)
        safe, scale = self._split(logits, labels)
        return -log_p.gather(-1, safe.unsqueeze(-1)).squeeze(-1) * scale

    def positions(self, output_shape: tuple[int, ...]) -> int:
        return math.prod(_without((1, *output_shape), self._axis((1, *output_shape))))

    def position_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Positions that are ignored have no row; an example with fewer than others has rows of zero."""
        axis = self._axis(outputs.shape, targets)
        gradient = self.loss_gradient(outputs, targets).movedim(axis, -1)
        flat = gradient.reshape(len(outputs), -1, outputs.shape[axis])  # (B, T, O)
        used = (flat != 0).any(2)
        count = max(1, int(used.sum(1).max()))
        order = (~used).int().argsort(dim=1, stable=True)[:, :count]  # (B, K)
        values = flat.new_zeros(count, *flat.shape)
        number, example = torch.arange(count).unsqueeze(0), torch.arange(len(flat)).unsqueeze(1)
        values[number, example, order] = flat[example, order]
        shape = (count * len(flat), *outputs.shape[1:])
        return _restore(values.flatten(0, 1), shape, axis).reshape(count, *outputs.shape)

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Closed-form factor of ``w (diag(p) - p pᵀ)``, O - 1 columns a position, detached.

        T positions give ``C = T (O - 1)`` columns, each non-zero at one position alone; they come
        position by position. See `softmax_factor`.
        """
        logits, labels, axis = self._flatten(outputs.detach(), targets)
        if labels.is_floating_point():
            scale = (self._weights(logits) * labels).sum(-1)
        else:
            scale = self._split(logits, labels)[1]
        batch, positions, classes = logits.shape
        columns = softmax_factor(logits.reshape(-1, classes), scale.reshape(-1))
        columns = columns.reshape(classes - 1, batch, positions, classes)
        if positions > 1:
            spread = columns.new_zeros(positions, classes - 1, batch, positions, classes)
            spread.diagonal(dim1=0, dim2=3).copy_(columns.movedim(2, -1))
            columns = spread.reshape(-1, batch, positions, classes)
        flat = columns.reshape(-1, positions, classes)  # the batch axis holds C · B for `_restore`
        stacked = (flat.shape[0], *outputs.shape[1:])
        return _restore(flat, stacked, axis).reshape(-1, *outputs.shape)

    def sampled_gradient(self, outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
        """``√w (p - e_k)`` at labels ``k`` drawn from ``p``, one a position; ``w`` is the weight in the Hessian."""
        logits, labels, axis = self._flatten(outputs.detach(), targets)
        if labels.is_floating_point():
            scale = (self._weights(logits) * labels).sum(-1)
        else:
            scale = self._split(logits, labels)[1]
        p = to_float64(logits).softmax(-1)  # (B, T, O)
        chance = uniform.movedim(axis, -1).reshape(p.shape)[..., :1] * p.sum(-1, keepdim=True)
        drawn = (p.cumsum(-1) <= chance).sum(-1, keepdim=True).clamp_max(p.shape[-1] - 1)
        others = p.scatter(-1, drawn, 0)
        gradient = others.scatter(-1, drawn, -others.sum(-1, keepdim=True))
        gradient = gradient * to_float64(scale).sqrt().unsqueeze(-1)
        return _restore(gradient.to(logits), outputs.shape, axis)

    def hessian_rank(self, output_shape: tuple[int, ...]) -> int:
        axis = self._axis((1, *output_shape))
        return math.prod(_without((1, *output_shape), axis)) * (output_shape[axis - 1] - 1)

    def leading_factor(
        self, outputs: Tensor, targets: Tensor, directions: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Leading directions without the T (O - 1) columns of `hessian_factor`.

        One position: from the secular equation, for many classes and few directions (at 1000 classes and
        10 directions some 25 times as fast, see `softmax_directions`). Several: one small decomposition
        a position, see `position_directions`.
        """
        logits, labels, axis = self._flatten(outputs.detach(), targets)
        _, positions, classes = logits.shape
        if positions == 1 and 8 * directions > classes:
            return None
        if labels.is_floating_point():
            scale = (self._weights(logits) * labels).sum(-1)
        else:
            scale = self._split(logits, labels)[1]
        if positions > 1:
            rows, eigenvalues, trace = position_directions(logits, scale, directions)
            kept = rows.shape[1]
            flat = rows.transpose(0, 1).reshape(-1, positions, classes)
            values = _restore(flat, (len(flat), *outputs.shape[1:]), axis)
            return values.reshape(kept, *outputs.shape), eigenvalues, trace
        scale = to_float64(scale)  # (B, 1)
        rows, eigenvalues, trace = softmax_directions(logits[:, 0], directions)
        rows = rows * scale.sqrt().unsqueeze(-1)  # (B, k, O)
        values = rows.movedim(1, 0).to(outputs)
        return values.reshape(directions, *outputs.shape), eigenvalues * scale, trace * scale[:, 0]

    # -- what a prediction is --------------------------------------------------------------------

    def inverse_link(self, outputs: Tensor) -> Tensor:
        """Probabilities of samples ``(S, B, *out)``."""
        return outputs.softmax(self._trailing_axis(outputs))

    def centre(self, change: Tensor) -> Tensor:
        """Softmax does not see a constant added to all logits."""
        return change - change.mean(self._trailing_axis(change), keepdim=True)

    def _trailing_axis(self, samples: Tensor) -> int:
        """Class axis, from the end, of samples ``(S, B, *out)``."""
        shape = samples.shape[1:]
        return self._axis(shape) - len(shape)

    # -- predictions -----------------------------------------------------------------------------

    @formerly_positional("linearised")
    def moments(self, samples: Tensor, point: Tensor, *, linearised: bool) -> Moments:
        """Mean probabilities ``(B, *out)`` and entropies in nats, ``(B,)`` or ``(B, *positions)``.

        ``total = H[mean_s p_s]``, ``aleatoric = mean_s H[p_s]`` and their difference, the mutual
        information between label and weights (never below 0; rounding could put it there).
        """
        variance = epistemic_variance(samples, point, linearised=linearised)
        axis = self._axis(point.shape)
        log_p = samples.log_softmax(axis + 1)
        log_mean = log_mean_exp(log_p)
        total = entropy_terms(log_mean).sum(axis)
        aleatoric = entropy_terms(log_p).sum(axis + 1).mean(0)
        epistemic = (total - aleatoric).clamp_min(0)
        return Moments(log_mean.exp(), variance, total, aleatoric, epistemic)

    def log_predictive(self, samples: Tensor, targets: Tensor) -> Tensor:
        """``log mean_s p_s(y)`` of each position, summed over positions: ``(B,)``.

        Soft labels average it over the label distribution. Ignored positions add nothing; class
        weights are not applied, as they weight a loss and not a probability.
        """
        require_samples(samples, 1)
        axis = self._axis(samples.shape[1:], self.prepare_targets(samples[0], targets))
        log_mean = log_mean_exp(samples.log_softmax(axis + 1))
        flat, labels, _ = self._flatten(log_mean, targets)
        if labels.is_floating_point():
            return (labels * flat).sum((1, 2))
        kept = self._kept(labels)
        index = torch.where(kept, labels, torch.zeros_like(labels)).unsqueeze(-1)
        return (flat.gather(-1, index).squeeze(-1) * kept).sum(1)

    def divergence(self, point: Tensor, samples: Tensor, targets: Tensor) -> Tensor:
        """Exact, averaged over the positions that are not ignored: ``(S, B)``. Weights do not enter."""
        flat, labels, axis = self._flatten(point, targets)
        log_p = flat.log_softmax(-1)
        log_q = samples.movedim(axis + 1, -1).reshape(len(samples), *flat.shape).log_softmax(-1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)  # (S, B, T)
        if labels.is_floating_point():
            return each.mean(-1).clamp_min(0)
        kept = self._kept(labels)
        return ((each * kept).sum(-1) / kept.sum(-1).clamp_min(1)).clamp_min(0)

    def correct(self, mean: Tensor, targets: Tensor) -> Tensor:
        """1 where the most probable class is the label's, else 0; flat, ignored positions dropped."""
        flat, labels, _ = self._flatten(mean, targets)
        if labels.is_floating_point():
            return (flat.argmax(-1) == labels.argmax(-1)).flatten().to(mean.dtype)
        return (flat.argmax(-1) == labels)[self._kept(labels)].to(mean.dtype)

    def confidence(self, mean: Tensor, targets: Tensor) -> Tensor:
        """Probability of the most probable class; flat, ignored positions dropped."""
        flat, labels, _ = self._flatten(mean, targets)
        top = flat.amax(-1)
        return top.flatten() if labels.is_floating_point() else top[self._kept(labels)]

    # -- storage ---------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "class_axis": self.class_axis,
            "weight": None if self.weight is None else self.weight.tolist(),
            "ignore_index": self.ignore_index,
            "seen_axes": {str(ndim): axis for ndim, axis in self._seen_axes.items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Classification:
        skip = ("name", "seen_axes")
        likelihood = cls(**{key: value for key, value in config.items() if key not in skip})
        seen = config.get("seen_axes", {})
        likelihood._seen_axes = {int(ndim): int(axis) for ndim, axis in seen.items()}
        return likelihood


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _restore(flat: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """``(B, T, O)`` back to ``shape``, with the class axis in its place."""
    return flat.reshape(*_without(shape, axis), shape[axis]).movedim(-1, axis)
