"""What to preserve: the cotangents that turn a model's Jacobian into the rows of the constraint matrix.

Row (n, c) of A is ``v_{c,n}ᵀ J_n`` with a cotangent ``v_{c,n}`` of the shape of one example's output. A
new thing to preserve is one subclass of `Preserve` under `@register_preserve`:

```python
@register_preserve
class FirstOutput(Preserve):
    name = "first-output"

    def num_rows(self, likelihood, output_shape):
        return 1

    def build(self, likelihood, outputs, targets):
        values = torch.zeros_like(outputs).unsqueeze(0)
        values[0, :, 0] = 1
        return values

    def describe(self):
        return "the first output of each example"
```
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from nullbayes.common.forward_mode import jvp
from nullbayes.constraints.directions import (
    AUTO_SHARE,
    Cotangents,
    Directions,
    leading_directions,
    resolve_directions,
    trace_of,
)
from nullbayes.errors import InputError
from nullbayes.likelihood.base import Likelihood
from nullbayes.likelihood.helpers import check_finite


class Preserve(ABC):
    """What the posterior must leave as it is on the training data. Subclass it to add one.

    Write `num_rows`, `build` and `describe`; this class checks what goes in and what comes out.
    """

    name: ClassVar[str]
    takes_directions: ClassVar[bool] = False
    #: whether a row times a weight change is in nats (loss) or their square roots (Fisher units)
    natural_units: ClassVar[bool] = False
    #: whether the rows of an example depend on its number in the data, as those of sampled labels do
    numbered: ClassVar[bool] = False
    #: whether the rows of all directions add up to a curvature of the log likelihood, which an evidence needs
    curvature: ClassVar[bool] = False

    @abstractmethod
    def num_rows(self, likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
        """C, the rows per example with all directions preserved (output shape without the batch axis)."""

    @abstractmethod
    def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cotangents ``(C, B, *out)``, in the dtype and on the device of ``outputs`` ``(B, *out)``."""

    @abstractmethod
    def describe(self) -> str:
        """What is preserved, as a phrase that ends "the posterior preserves ..."."""

    def change(
        self,
        likelihood: Likelihood,
        point: Tensor,
        samples: Tensor,
        targets: Tensor,
        *,
        linear: bool,
    ) -> Tensor:
        """How far samples ``(S, B, *out)`` move what is preserved, element by element: ``(S, B, ...)``.

        For the certificate. ``linear``: to first order, where what is preserved is not an output itself.
        Default: the change of the outputs.
        """
        return samples - point

    def rows(
        self, likelihood: Likelihood, output_shape: tuple[int, ...], directions: Directions = None
    ) -> int:
        """Rows per example, C; for ``directions="auto"`` an upper bound.

        Raises `InputError` for directions that make no sense, or not for this mode.
        """
        limit = self._check_directions(directions)
        full = self.num_rows(likelihood, tuple(output_shape))
        if not isinstance(limit, int):
            return full
        return min(limit, full, max(1, math.prod(output_shape)))

    def cotangents(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor,
        directions: Directions = None,
    ) -> Cotangents:
        """The cotangents of one batch, with what ``directions`` left out.

        Raises `InputError` as `rows` does, and `NonFiniteError` if a cotangent is NaN or infinite.
        """
        limit = self._check_directions(directions)
        outputs = outputs.detach()
        targets = targets.detach() if isinstance(targets, Tensor) else targets
        shortcut = None if limit is None else self.shortcut(likelihood, outputs, targets, limit)
        values = self.build(likelihood, outputs, targets) if shortcut is None else shortcut.values
        values = values.detach()
        if values.shape[1:] != outputs.shape:
            raise InputError(
                f'preserve="{self.name}" built cotangents of shape {tuple(values.shape)} for outputs '
                f"of shape {tuple(outputs.shape)}; expected (C, {', '.join(map(str, outputs.shape))})."
            )
        check_finite(
            values.movedim(1, 0),
            f'the cotangents of preserve="{self.name}"',
            "Check the outputs and targets with `Likelihood.validate`, and your own likelihood's derivatives.",
        )
        if shortcut is not None:
            return shortcut
        if limit is not None:
            return leading_directions(values, limit)
        trace = trace_of(values)
        return Cotangents(values, torch.zeros_like(trace), trace)

    def shortcut(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor,
        directions: int | Literal["auto"],
    ) -> Cotangents | None:
        """Leading directions without `build`, where there is a faster way; None: there is not."""
        return None

    def numbered_cotangents(
        self, likelihood: Likelihood, outputs: Tensor, targets: Tensor, numbers: Tensor
    ) -> Cotangents:
        """`cotangents` of the examples with these ``numbers (B,)`` in the training data, where that matters."""
        return self.cotangents(likelihood, outputs, targets)

    def _check_directions(self, directions: Any) -> Directions:
        limit = resolve_directions(directions)
        if limit is not None and not self.takes_directions:
            able = [f'"{name}"' for name, cls in _REGISTRY.items() if cls.takes_directions]
            raise InputError(
                f'directions={directions!r} with preserve="{self.name}": only '
                f"preserve={' or '.join(able)} has directions to choose from. Leave `directions` out."
            )
        return limit


# -- the registry --------------------------------------------------------------------------------

_REGISTRY: dict[str, type[Preserve]] = {}
_Class = TypeVar("_Class", bound=type[Preserve])


def register_preserve(cls: _Class) -> _Class:
    """Class decorator: make ``preserve=cls.name`` work. Raises `InputError` if the name is taken."""
    holder = _REGISTRY.get(cls.name)
    if holder is not None and holder.__qualname__ != cls.__qualname__:
        raise InputError(
            f"the name {cls.name!r} belongs to {holder.__qualname__}; give {cls.__qualname__} another `name`."
        )
    _REGISTRY[cls.name] = cls
    return cls


def resolve_preserve(value: str | Preserve) -> Preserve:
    """The strategy of that name, or the object itself. Raises `InputError` listing the names."""
    if isinstance(value, Preserve):
        return value
    if isinstance(value, str) and value in _REGISTRY:
        return _REGISTRY[value]()
    raise InputError(
        f"preserve is {value!r}, expected {', '.join(repr(name) for name in sorted(_REGISTRY))} or a Preserve "
        f'object. When in doubt leave it at "predictions".'
    )


# -- what can be preserved -----------------------------------------------------------------------


@register_preserve
class Predictions(Preserve):
    """Rows ``L_nᵀ J_n`` with ``H_n = L_n L_nᵀ``: the null space of the Gauss-Newton matrix."""

    name = "predictions"
    takes_directions = True
    natural_units = True
    curvature = True

    def num_rows(self, likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
        return likelihood.hessian_rank(output_shape)

    def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        return likelihood.hessian_factor(outputs, targets)

    def shortcut(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor,
        directions: int | Literal["auto"],
    ) -> Cotangents | None:
        tried = 8 if directions == "auto" else directions
        while True:
            found = likelihood.leading_factor(outputs, targets, tried)
            if found is None:
                return None
            values, eigenvalues, trace = found
            left = trace.unsqueeze(-1) - eigenvalues.cumsum(-1)  # (B, k)
            if directions != "auto":
                discarded = left[:, -1].clamp_min(0)
                return Cotangents(values, discarded.to(outputs), trace.to(outputs))
            missing = left > (1 - AUTO_SHARE) * trace.unsqueeze(-1)
            if not bool(missing[:, -1].any()):
                break
            tried *= 2  # most batches stop early; how many are needed is not known before
        # The first row is needed where there is any trace, row c where c rows are not enough.
        needed = torch.cat([trace.unsqueeze(-1) > 0, missing[:, :-1]], dim=-1)
        used = needed.sum(-1)
        left = torch.cat([trace.unsqueeze(-1), left], dim=-1).gather(-1, used.unsqueeze(-1))[:, 0]
        mask = needed.T.reshape(*needed.T.shape, *[1] * (outputs.ndim - 1)).to(values.device)
        longest = max(1, int(used.max()))
        values = (values * mask)[:longest]
        return Cotangents(values, left.clamp_min(0).to(outputs), trace.to(outputs))

    def change(
        self,
        likelihood: Likelihood,
        point: Tensor,
        samples: Tensor,
        targets: Tensor,
        *,
        linear: bool,
    ) -> Tensor:
        """Change of the predicted probabilities (of the outputs, for regression)."""
        return likelihood.inverse_link(samples) - likelihood.inverse_link(point[None])

    def describe(self) -> str:
        return "the training predictions"


@register_preserve
class Outputs(Preserve):
    """Rows ``J_n``: the null space of the full Jacobian. Targets are not used."""

    name = "outputs"

    def num_rows(self, likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
        return math.prod(output_shape)

    def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        width = math.prod(outputs.shape[1:])
        identity = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
        # One identity for the whole batch, not B copies: 512 MB at B = 128 and a thousand outputs.
        return identity.reshape(width, 1, *outputs.shape[1:]).expand(width, *outputs.shape)

    def describe(self) -> str:
        return "every raw output on the training data"


@register_preserve
class Loss(Preserve):
    """Rows ``∇_f ℓ_nᵀ J_n``, one an example: each example's loss is preserved to first order."""

    name = "loss"
    natural_units = True

    def num_rows(self, likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
        return 1

    def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        return likelihood.loss_gradient(outputs, targets).unsqueeze(0)

    def change(
        self,
        likelihood: Likelihood,
        point: Tensor,
        samples: Tensor,
        targets: Tensor,
        *,
        linear: bool,
    ) -> Tensor:
        """Change of each example's loss in nats, ``(S, B)``."""
        if linear:
            gradient = likelihood.loss_gradient(point, targets)
            return ((samples - point) * gradient).reshape(*samples.shape[:2], -1).sum(2)
        before = likelihood.loss(point, targets)
        return torch.stack([likelihood.loss(sample, targets) - before for sample in samples])

    def describe(self) -> str:
        return "each training example's loss"


@register_preserve
class TokenLoss(Preserve):
    """One row for each position of each example: each token's loss is preserved to first order.

    Positions that are ignored have none. For classification with outputs ``(B, T, O)``, images included.
    """

    name = "token-loss"
    natural_units = True

    def num_rows(self, likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
        return likelihood.positions(output_shape)

    def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        return likelihood.position_gradients(outputs, targets)

    def change(
        self,
        likelihood: Likelihood,
        point: Tensor,
        samples: Tensor,
        targets: Tensor,
        *,
        linear: bool,
    ) -> Tensor:
        """Change of the loss of each position that counts, in nats, ``(S, tokens)``."""
        before = likelihood.position_losses(point, targets)
        counted = before != 0
        if linear:
            after = [
                jvp(lambda f: likelihood.position_losses(f, targets), (point,), (sample - point,))
                for sample in samples
            ]
        else:
            after = [likelihood.position_losses(sample, targets) - before for sample in samples]
        return torch.stack([a[counted] for a in after])

    def describe(self) -> str:
        return "the loss of each token of the training data"


# -- leading directions --------------------------------------------------------------------------
