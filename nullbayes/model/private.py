"""A private copy of a module tree for one call: the user's modules are never written to while weights differ.

`torch.func.functional_call` puts other weights into the user's own modules for the length of a call: a second
thread sees them. Here each call gets modules of its own, which share parameters, buffers and everything else with
the originals, and hold other tensors only where they are told to. Building them costs microseconds a module.
"""

from __future__ import annotations

import collections
import dis
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.model.frozen import stand_in
from nullbayes.model.parameters import HALF
from nullbayes.model.transformer import PaddedEncoder, is_nested

Hook = Callable[..., Any]
Hooks = Sequence[tuple[str, Hook]]

# Attributes that hold nothing of a module tree: most of them.
_ATOMS = frozenset(
    {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, type}
)
# Of `nn.Module` itself: parameters, buffers and children are given anew; the rest holds no modules.
_OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
# What a module that stands in for a wrapper needs of the wrapper's state.
_BASICS = frozenset(vars(nn.Module())) - {"forward"}
# Parts of a call of a method with constants.
_CALLING = (
    "LOAD_",
    "CALL",
    "PRECALL",
    "KW_NAMES",
    "PUSH_NULL",
    "POP_TOP",
    "RETURN_",
    "RESUME",
    "NOP",
)
_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks"})
# Attributes that a forward pass may write anew without keeping a state.
_CHANGING = frozenset({"_flat_weights", "_flat_weight_refs", "use_nested_tensor"})
# How deep containers are searched for modules, and how long they may be.
DEPTH = 3
LENGTH = 1000

# One model at a time is called with other weights in its own modules, where a private copy does not do.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()


class _Passthrough(nn.Module):
    """Calls its one child: in place of wrappers that act on gradients of the user's own parameters."""

    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Copier:
    """One private copy of a tree.

    Args:
        tensors: what to put in place of parameters, by the identity of the original.
        hooks: by the identity of the module.
        widened: what half-precision tensors become; None: they stay.
    """

    def __init__(
        self,
        tensors: Mapping[int, Tensor],
        hooks: Mapping[int, list[Hook]],
        widened: torch.dtype | None,
        *,
        padded: bool,
        whole: bool = False,
    ) -> None:
        self.tensors, self.hooks, self.widened, self.padded = tensors, hooks, widened, padded
        # Whether frozen weights are widened as a whole, too: copied.
        self.whole = whole
        self.made: dict[int, nn.Module] = {}
        # State of each private module as it was made: attributes, and versions of its buffers.
        self._states: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []

    def tree(self, root: nn.Module) -> nn.Module:
        modules = list(_copied(root))
        # All modules first: attributes of one may refer to any other.
        for module in modules:
            self.made[id(module)] = _blank(module, self.kind(module))
        for module in modules:
            self._fill(module, self.made[id(module)])
        return self.made[id(root)]

    def kind(self, module: nn.Module) -> type[nn.Module]:
        """The class of the private module."""
        if self.padded and is_nested(module):
            return PaddedEncoder
        return self._frozen(module) or type(module)

    def _frozen(self, module: nn.Module) -> type[nn.Module] | None:
        """What computes with the module's half-precision weight without a wide copy of it."""
        weight = module._parameters.get("weight")
        if self.widened is None or self.whole or weight is None or weight.dtype not in HALF:
            return None
        return None if id(weight) in self.tensors else stand_in(module)

    def _fill(self, module: nn.Module, new: nn.Module) -> None:
        state = dict(module.__dict__)
        parameters, tensors = state["_parameters"], self.tensors
        frozen = hasattr(type(new), "widened")
        state["_parameters"] = {
            k: p if p is None or (frozen and k == "weight") else self._wide(tensors.get(id(p), p))
            for k, p in parameters.items()
        }
        if frozen:
            state["widened"] = self.widened
        state["_buffers"] = {
            k: b if b is None else self._wide(b.detach().clone())
            for k, b in state["_buffers"].items()
        }
        state["_modules"] = {
            k: m if m is None else self.made.get(id(m), m) for k, m in state["_modules"].items()
        }
        for key, value in state.items():
            if type(value) in _ATOMS or key in _OWN or value is None:
                continue
            if type(value) is collections.OrderedDict and not value:
                state[key] = collections.OrderedDict()  # hooks: ours must not reach the original
                continue
            if key in _HOOKS:
                value = collections.OrderedDict(
                    (k, hook) for k, hook in value.items() if not _marks_alone(hook)
                )
            state[key] = self.rebound(value, DEPTH)
        if isinstance(new, (_Compiled, _Passthrough)):
            state = {k: v for k, v in state.items() if k in _BASICS}
        if state.get("_compiled_call_impl") is not None:
            state["_compiled_call_impl"] = None
        vars(new).update(state)
        buffers = {k: (b, b._version) for k, b in state["_buffers"].items() if b is not None}
        self._states.append((new, state, buffers))
        if isinstance(module, nn.RNNBase) and isinstance(new, nn.RNNBase):
            _refer(new)
        for hook in self.hooks.get(id(module), ()):
            new.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def written(self) -> list[str]:
        """Names of attributes and buffers that a forward pass has written to the private modules."""
        found: list[str] = []
        for module, state, buffers in self._states:
            now = vars(module)
            found += [k for k in now if k not in state or now[k] is not state[k]]
            held = now["_buffers"]
            found += [k for k in held if k not in buffers and held[k] is not None]
            found += [k for k, (b, v) in buffers.items() if held.get(k) is not b or b._version != v]
        return sorted(set(found) - _CHANGING)

    def _wide(self, tensor: Tensor) -> Tensor:
        if self.widened is None or tensor.dtype not in HALF:
            return tensor
        return tensor.to(self.widened)

    def rebound(self, value: Any, depth: int = DEPTH) -> Any:
        """``value`` with the private modules and tensors in place of the originals."""
        if isinstance(value, nn.Module):
            return self.made.get(id(value), value)
        if isinstance(value, Tensor):
            return self._wide(self.tensors.get(id(value), value))
        if isinstance(value, types.MethodType):
            owner = self.rebound(value.__self__, 0)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, functools.partial):
            return self._partial(value, depth)
        if depth > 0 and isinstance(value, (dict, list, tuple, set)) and len(value) <= LENGTH:
            return self._container(value, depth - 1)
        return value

    def _container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in (dict, collections.OrderedDict):
            return kind((k, self._inside(v, depth)) for k, v in value.items())
        if kind in (list, set, tuple):
            new = [self._inside(v, depth) for v in value]
            if kind is tuple and all(a is b for a, b in zip(new, value, strict=True)):
                return value
            return kind(new)
        return value

    def _inside(self, value: Any, depth: int) -> Any:
        return value if type(value) in _ATOMS else self.rebound(value, depth)

    def _partial(self, value: functools.partial[Any], depth: int) -> Any:
        func = self.rebound(value.func, depth)
        args = tuple(self._inside(a, depth) for a in value.args)
        keywords = {k: self._inside(v, depth) for k, v in value.keywords.items()}
        same = func is value.func and all(a is b for a, b in zip(args, value.args, strict=True))
        if same and all(keywords[k] is v for k, v in value.keywords.items()):
            return value
        new = functools.partial(func, *args, **keywords)
        new.__dict__.update(value.__dict__)
        return new

    def _function(self, value: types.FunctionType, depth: int) -> Any:
        """A function whose closure, defaults or global names refer to the tree refers to the private one."""
        if depth <= 0:
            return value
        closure, changed = value.__closure__, False
        if closure is not None:
            cells = []
            for cell in closure:
                try:
                    content = cell.cell_contents
                except ValueError:  # not filled yet
                    cells.append(cell)
                    continue
                mine = content if content is value else self._inside(content, depth - 1)
                if self._moved(mine, content):
                    cells.append(types.CellType(mine))
                    changed = True
                else:
                    cells.append(cell)
            closure = tuple(cells)
        names = [n for n in value.__code__.co_names if n in value.__globals__]
        found = {n: self.made.get(id(value.__globals__[n])) for n in names}
        mine = {n: m for n, m in found.items() if m is not None}
        scope = {**value.__globals__, **mine} if mine else value.__globals__
        if not changed and not mine:
            return value
        new = types.FunctionType(value.__code__, scope, value.__name__, value.__defaults__, closure)
        new.__kwdefaults__ = value.__kwdefaults__
        new.__dict__.update(value.__dict__)
        return new

    @staticmethod
    def _moved(new: Any, old: Any) -> bool:
        """Whether a rebound value refers to anything private: copies of containers alone do not count."""
        if new is old:
            return False
        if isinstance(old, dict):
            return any(Copier._moved(new[k], v) for k, v in old.items())
        if isinstance(old, (list, tuple)):
            return any(Copier._moved(a, b) for a, b in zip(new, old, strict=True))
        if isinstance(old, set):
            return new != old
        return True


def _marks_alone(hook: Any) -> bool:
    """Whether all that a hook does is to call ``requires_grad_()``.

    So does what is left of training with checkpoints (`gradient_checkpointing_enable` of transformers, peft's
    preparation of a base in few bits); within `torch.func` that call is an error.
    """
    code = getattr(hook, "__code__", None)
    return code is not None and code.co_names == ("requires_grad_",) and _does_no_more(code)


@functools.cache
def _does_no_more(code: types.CodeType) -> bool:
    """Whether a function with one name in it computes nothing and returns nothing."""
    *done, last = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    if last[0] == "RETURN_VALUE":
        last = done.pop()
    nothing = last in (("LOAD_CONST", None), ("RETURN_CONST", None))
    return nothing and all(name.startswith(_CALLING) for name, _ in done)


def _copied(root: nn.Module) -> Iterator[nn.Module]:
    """All modules of a tree, each once, but for TorchScript, which stays as it is."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
            continue
        seen.add(id(module))
        yield module
        waiting += [child for child in module._modules.values() if child is not None]


def _blank(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        kind = _Passthrough
    elif kind.__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        kind = _Compiled
    new = object.__new__(kind)
    for base in kind.__mro__:
        for name in _slots(base):
            if hasattr(module, name):
                object.__setattr__(new, name, getattr(module, name))
    return new


class _Compiled(nn.Module):
    """In place of what ``torch.compile`` wrapped: the module itself, uncompiled, under the same name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["_orig_mod"](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["_orig_mod"], name)


def _slots(base: type) -> Iterator[str]:
    found = base.__dict__.get("__slots__", ())
    for name in (found,) if isinstance(found, str) else found:
        if name not in ("__dict__", "__weakref__"):
            yield name


def _refer(rnn: nn.RNNBase) -> None:
    """Recurrent layers keep their weights a second time, in a list, and watch whether they are still the same."""
    weights = [getattr(rnn, name, None) for name in rnn._flat_weights_names]
    rnn._flat_weights = weights
    rnn._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]


class Modules:
    """How a model is called with other weights.

    Args:
        model: the user's; never written to, unless ``shared``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Whether forward passes use modules that a private copy cannot stand for: then the user's own are called,
        # one call at a time.
        self.shared = False

    def private(
        self,
        tensors: Mapping[int, Tensor],
        hooks: Hooks = (),
        root: nn.Module | None = None,
        widened: torch.dtype | None = None,
        *,
        padded: bool = False,
        whole: bool = False,
    ) -> tuple[nn.Module, Copier]:
        """A copy of ``root`` (default: the whole model) with ``tensors`` by the identity of the parameter.

        Args:
            hooks: forward hooks by the path of their module, called with keyword arguments before the user's.
            widened: what tensors in half precision become.
            padded: transformer encoders give zeros at padded positions, see ``transformer.py``.
            whole: frozen weights in half precision are copied, too; otherwise see ``frozen.py``.
        """
        root = self.model if root is None else root
        by_path = dict(root.named_modules(remove_duplicate=False)) if hooks else {}
        hooked: dict[int, list[Hook]] = {}
        for path, hook in hooks:
            hooked.setdefault(id(by_path[path]), []).append(hook)
        copier = Copier(tensors, hooked, widened, padded=padded, whole=whole)
        return copier.tree(root), copier

    @contextmanager
    def lent(self, tensors: Mapping[int, Tensor], hooks: Hooks = ()) -> Iterator[nn.Module]:
        """The user's own modules with ``tensors`` in them, for one thread at a time."""
        with _GUARD:
            lock = _LOCKS.setdefault(self.model, threading.RLock())
        with lock:
            undo: list[Callable[[], None]] = []
            try:
                by_path = dict(self.model.named_modules())
                for path, hook in hooks:
                    handle = by_path[path].register_forward_hook(
                        hook, with_kwargs=True, prepend=True
                    )
                    undo.append(handle.remove)
                for module in self.model.modules():
                    _lend(module, tensors, undo)
                yield self.model
            finally:
                for step in reversed(undo):
                    step()


def _lend(module: nn.Module, tensors: Mapping[int, Tensor], undo: list[Callable[[], None]]) -> None:
    before = dict(module._parameters)
    undo.append(functools.partial(module._parameters.update, before))
    lent: dict[str, Any] = {k: p if p is None else tensors.get(id(p), p) for k, p in before.items()}
    module._parameters.update(lent)
    buffers = dict(module._buffers)
    undo.append(functools.partial(module._buffers.update, buffers))
    module._buffers.update({k: b if b is None else b.detach().clone() for k, b in buffers.items()})
    if isinstance(module, nn.RNNBase):
        kept = {n: vars(module)[n] for n in ("_flat_weights", "_flat_weight_refs")}
        undo.append(functools.partial(vars(module).update, kept))
        _refer(module)
