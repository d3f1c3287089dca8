"""Hooks that hand on what each weight multiplies, for the length of a ``with`` block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor

from nullbayes.common.switch import switch
from nullbayes.errors import ModelError
from nullbayes.moments.blocks import Site
from nullbayes.moments.rule import Seen, Summer

# Of one call: which site, its block, the column of its bias, what was seen.
Receive = Callable[[int, int, int | None, Seen], None]
_NOTHING = nullcontext()

TRANSFORMED = (
    "its layer is called within `torch.func` (`vmap`, `jacrev`), where its inputs cannot be read"
)
NESTED = "its layer is called on nested tensors, which no rule reads"


class TransformedCall(ModelError):
    """A layer was called within `torch.func` (`vmap`, `jacrev`), where nothing says which example it sees; or on nested
    tensors, which no rule reads.

    Attributes:
        site: the number of the layer.
        reason: why its weights stay fixed.
    """

    def __init__(self, message: str, site: int, reason: str) -> None:
        super().__init__(message)
        self.site, self.reason = site, reason


@contextmanager
def _unfused() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


#: Attention by its ordinary operations: the fused one of evaluation mode calls no hooks.
plain_paths = switch(_unfused)


def hooks_of(
    sites: Sequence[Site],
    receive: Receive,
    summers: Mapping[int, Summer] | None = None,
    thin: int | None = None,
) -> list[tuple[str, Callable[..., None]]]:
    """Forward hooks by the path of their module that hand the weights' inputs of each call to ``receive``.

    Args:
        summers: by number of the site, what takes its calls instead, unless it says no.
        thin: so many positions of each example are enough.

    Within them `ModelError` is raised where a rule fails on its module.
    """
    busy = False

    def hook_of(number: int, site: Site) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> None:
            nonlocal busy
            if busy:  # a rule may call its module again
                return
            _check_plain(number, site, args, kwargs)
            busy = True
            try:
                # Asking costs a tenth of turning gradients off once more.
                with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
                    summer = None if summers is None else summers.get(number)
                    if summer is not None:
                        with torch._C.DisableTorchFunction():  # modes watch the network, not this
                            if summer.add(module, args, kwargs, out):
                                return
                    if thin is None:
                        found = site.rule.inputs(module, args, kwargs, out)
                    else:
                        found = site.rule.thinned(module, args, kwargs, out, thin)
                    for seen in found:
                        if seen.weight in site.places:
                            with torch._C.DisableTorchFunction():
                                receive(number, *site.places[seen.weight], seen)
            except (AttributeError, IndexError, TypeError) as error:
                raise ModelError(
                    f"the rule {type(site.rule).__name__} cannot read the inputs of {site.path or 'the model'!r} "
                    f"({type(module).__name__}): {type(error).__name__}: {error}. Leave its weights out "
                    "(`parameters=`), or register a rule of your own (`nb.moments.register`)."
                ) from error
            finally:
                busy = False

        return hook

    return [(site.path, hook_of(number, site)) for number, site in enumerate(sites)]


def _check_plain(number: int, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_nested:
            raise TransformedCall(
                f"{site.path or 'the model'!r} ({type(site.module).__name__}) is called on a nested tensor, which no "
                "rule reads. Leave its weights out (`parameters=`), or call it on what is inside (`.values()`) or on "
                "padded tensors.",
                number,
                NESTED,
            )
        if isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value):
            raise TransformedCall(
                f"{site.path or 'the model'!r} ({type(site.module).__name__}) is called within a transformation of "
                "`torch.func` (`vmap`, `jacrev`, ...), where its inputs cannot be read. Leave its weights out "
                "(`parameters=`), or call it on the whole batch.",
                number,
                TRANSFORMED,
            )


@contextmanager
def recording(
    sites: Sequence[Site],
    receive: Receive,
    summers: Mapping[int, Summer] | None = None,
    thin: int | None = None,
) -> Iterator[None]:
    """While it lasts, each call of a module with a rule hands its weights' inputs on, see :func:`hooks_of`.

    Calls by this thread: the user may call the network in another one at the same time.
    """
    handles = []
    try:
        with plain_paths():
            hooks = hooks_of(sites, receive, summers, thin)
            for site, (_, hook) in zip(sites, hooks, strict=True):
                own = _of_this_thread(hook)
                handles.append(site.module.register_forward_hook(own, with_kwargs=True))
            yield
    finally:
        for handle in handles:
            handle.remove()


def _of_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    owner = threading.get_ident()

    def own(*args: Any) -> None:
        if threading.get_ident() == owner:
            hook(*args)

    return own


class _Forward(nn.Module):
    """The forward pass of a module, without its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


@contextmanager
def restored(sites: Sequence[Site], originals: Sequence[dict[str, torch.Tensor]]) -> Iterator[None]:
    """While it lasts, each module with a rule gives what it gives with the weights of ``originals`` (by local name).

    The user's hooks act on that: what they read of the weights is no part of the layer.
    """
    busy, owner = False, threading.get_ident()

    def hook_of(own: dict[str, torch.Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            nonlocal busy
            if busy or threading.get_ident() != owner:
                return None
            busy = True
            try:
                inside = {f"inner.{name}": value for name, value in own.items()}
                return torch.func.functional_call(_Forward(module), inside, args, kwargs)
            finally:
                busy = False

        return hook

    handles = []
    try:
        with plain_paths():
            for site, own in zip(sites, originals, strict=True):
                handles.append(
                    site.module.register_forward_hook(hook_of(own), with_kwargs=True, prepend=True)
                )
            yield
    finally:
        for handle in handles:
            handle.remove()
