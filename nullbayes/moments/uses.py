"""Uses of weights outside of the layers that have a rule, noticed while the network runs over the data.

The proof of the rules (``verify.py``) runs the network on the first examples. Another example may take another way
(an early exit, a branch on its content) on which a function call reads a weight that so far only its layer read; or a
use that gave nothing so far (times a mask of zeros, in a `torch.where`) gives something for this one. So wherever a
function reads a weight, the batch is asked whether its outputs depend on that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nullbayes.errors import ModelError
from nullbayes.model.batch import Inputs, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.moments.blocks import Blocks
from nullbayes.moments.verify import other_uses

# What a use gives that outputs may depend on; a shape or a dtype is none.
_VALUES = (Tensor, float, complex, list)


class Uses:
    """Which weights of ``blocks`` are read by functions outside of their layers, in passes within :meth:`watched`."""

    def __init__(self, functional: FunctionalModel, blocks: Blocks) -> None:
        self.functional, self.blocks = functional, blocks
        #: names of weights that were read outside of their layers since the last question
        self.seen: set[str] = set()
        self.names = {name for block in blocks.blocks for name in block.names}
        #: by their memory, those of the network that is called now
        self.weights: dict[int, str] = {}
        #: whether the network runs under a mode; None: not yet tried (some compiled operations do not)
        self.runs: bool | None = None

    def watched(self, inputs: Inputs) -> AbstractContextManager[None]:
        """A context in which passes of this thread are watched, where one over the first of ``inputs`` can be."""
        if self.runs is None:
            try:
                with self._watched(), torch.no_grad():
                    self.functional(self.functional.weights(), take(inputs, 0, 1))
                self.runs = True
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                # Whatever an operation makes of a mode; where it fails without one, that is told.
                self.runs = False
        return self._watched() if self.runs else nullcontext()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        depth, owner, handles = [0], threading.get_ident(), []

        def stepping(by: int) -> Callable[..., None]:
            def step(*_: Any) -> None:
                if threading.get_ident() == owner:
                    depth[0] += by

            return step

        try:
            for site in self.blocks.sites:
                module: nn.Module = site.module
                handles.append(module.register_forward_pre_hook(stepping(1)))
                # Before the user's own hooks: what these read is read outside of the layer.
                step = stepping(-1)
                handles.append(module.register_forward_hook(step, prepend=True, always_call=True))
            self.functional.watch = _Watch(self, depth)
            yield
        finally:
            self.functional.watch = None
            for handle in handles:
                handle.remove()

    def check(self, inputs: Inputs, where: str) -> None:
        """Raise `ModelError` if a use since the last batch moves an output of this one."""
        used, self.seen = self.seen, set()
        if self.runs is False:  # nobody looked: any of them may have been used
            used = self.names
        if not used:
            return
        numbers = [i for i, block in enumerate(self.blocks.blocks) if used & set(block.names)]
        with torch.no_grad():
            moves = other_uses(self.functional, self.blocks, inputs)
            if not moves(numbers):
                return
            bad = sorted(n for i in numbers if moves([i]) for n in self.blocks.blocks[i].names)
            bad = bad or sorted(used)  # together alone
        raise ModelError(
            f"{where}: {bad} are used outside of the layers that have a rule, on a way through the network that "
            "the first examples did not take, so what they multiply there is not known. Leave them out with "
            "`parameters=`, or put examples that take this way into the first batch: the weights are then fixed."
        )


class _Watch(TorchFunctionMode):
    def __init__(self, uses: Uses, depth: list[int]) -> None:
        super().__init__()
        self.uses, self.depth = uses, depth

    def sees(self, network: nn.Module) -> None:
        """The modules that are called now: weights may be copies of the user's, in another precision."""
        named, known = network.named_parameters(), self.uses.names
        self.uses.weights = {_storage(p): name for name, p in named if name in known}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.depth[0]:
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    name = self._name(tensor)
                    if name is not None and isinstance(out, _VALUES):
                        self.uses.seen.add(name)
        return out

    def _name(self, value: Any) -> str | None:
        if not isinstance(value, Tensor):
            return None
        return self.uses.weights.get(_storage(value))


def _storage(tensor: Tensor) -> int:
    """The same for a weight and its views; for the weight alone, where a tensor has no storage of its own."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)
