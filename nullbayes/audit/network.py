"""The user's network by itself: a deep copy that is called as anyone would call it, with weights written into it.

Rows are computed through `FunctionalModel`, which puts other weights in place of the network's own. Here nothing of
that is used, so that a mistake in it would show.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from nullbayes.model.batch import Inputs, plain
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.ragged import restored


class NetworkCopy:
    """A copy of the network, in its own precision or another; the user's is never written to.

    Args:
        dtype: what its floating-point tensors become; None: they stay.
        fresh: each call is the first one of a copy of its own, so that nothing that a network keeps from one call to
            the next (results by the identity or the version of a weight) is there at other weights.

    Raises:
        Exception: whatever copying this network raises; some networks cannot be copied.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        dtype: torch.dtype | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        self.functional, self.dtype, self.fresh = functional, dtype, fresh
        self.model = self._copied(functional.model, shared=dtype is None)
        if dtype is not None:
            keep_default_eps(self.model)
            self.model.to(dtype)
        self._parameters = self._chosen(self.model)
        self._trained = [p.detach().clone() for p in self._parameters]

    def _copied(self, model: nn.Module, *, shared: bool) -> nn.Module:
        chosen = set(self.functional.space.names)
        # A frozen base is never written to, and may be most of the memory there is.
        kept = dict(model.named_parameters()) if shared else {}
        memo: dict[int, Any] = {id(p): p for n, p in kept.items() if n not in chosen}
        return copy.deepcopy(model, memo)

    def _chosen(self, model: nn.Module) -> list[Tensor]:
        named = dict(model.named_parameters())
        return [named[name] for name in self.functional.space.names]

    def outputs(self, inputs: Inputs, delta: Tensor | None = None) -> Tensor:
        """``f(θ̂ + Δ, x) (B, *out)`` for ``delta (P,)``; at the trained weights without one."""
        given = self.functional.taken(plain(inputs))
        if self.dtype is not None:
            given = tree_map(lambda t: as_floating(t, self.dtype), given)
        given = restored(given)
        model, parameters = self.model, self._parameters
        if self.fresh:
            model = self._copied(model, shared=True)
            parameters = self._chosen(model)
        try:
            if delta is not None:
                self._write(parameters, delta)
            # In another precision, the copy follows the network that rows are taken of; in its own, a plain call.
            computing = nullcontext() if self.dtype is None else self.functional.computing()
            with torch.no_grad(), self.functional.drawing(inputs), computing:
                out = self._called(model, given)
        finally:
            if delta is not None:
                self._write(parameters, None)
        return self.functional.read(out, inputs).detach()

    def _called(self, model: nn.Module, given: Any) -> Any:
        forward = self.functional.user_forward
        if forward is not None:
            return forward(model, given)
        if isinstance(given, Mapping):
            return model(**given)
        several = isinstance(given, tuple) and not isinstance(given, PackedSequence)
        return model(*given) if several else model(given)

    def _write(self, parameters: list[Tensor], delta: Tensor | None) -> None:
        values = self._trained
        if delta is not None:
            moved = self.functional.space.unflatten(delta)
            values = [t + d.to(t) for t, d in zip(values, moved.values(), strict=True)]
        with torch.no_grad():
            torch._foreach_copy_(parameters, values)


class Exchanged:
    """For networks that cannot be copied: other weights put in place of their own, in their own precision.

    By :class:`FunctionalModel`, so that a mistake in it does not show; what acts past a gradient does.
    """

    dtype = None

    def __init__(self, functional: FunctionalModel) -> None:
        self.functional = functional

    def outputs(self, inputs: Inputs, delta: Tensor | None = None) -> Tensor:
        """``f(θ̂ + Δ, x) (B, *out)``, as :meth:`NetworkCopy.outputs`."""
        functional = self.functional
        weights = functional.weights()
        if delta is not None:
            moved = functional.space.unflatten(delta)
            weights = {n: w + moved[n].to(w) for n, w in weights.items()}
        with torch.no_grad():
            return functional(weights, inputs)


def keep_default_eps(model: nn.Module) -> None:
    """Write down the number that `nn.RMSNorm` takes for ``eps=None``: it follows the precision that it runs in."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            # In half precision, torch computes this layer in float32.
            exact = module.weight is not None and module.weight.dtype == torch.float64
            module.eps = torch.finfo(torch.float64 if exact else torch.float32).eps


def as_floating(leaf: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors in ``dtype``, anything else as it is."""
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


class WrittenOut(TorchFunctionMode):
    """Within it, in this thread, attention is the operations that it is made of; each has all its derivatives."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.multi_head_attention_forward and kwargs.get("need_weights") is False:
            # A mode does not see what a function calls; this one writes attention out itself if asked for weights.
            return func(*args, **(kwargs | {"need_weights": True}))[0], None
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(Q Kᵀ / √d + mask) V``."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value
