"""Does a call of the network draw random numbers? Asked of the state of every generator, before and after.

Global generators belong to all threads: while this one calls the network, the loader of another may draw its seed, or
a call of another may put back what it has moved. So where other threads are alive, the operations of this one are
watched as well. A state that moved without one of them is not held against the network if a further call moves
nothing (torch's numbers alone, whose operations all can be seen) or if it moves while this thread waits.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from nullbayes.errors import ModelError
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.randomness import drawing

# Calls of the network that are looked at, at most, where other threads draw torch's numbers meanwhile.
LOOKS = 5
# Seconds for which this thread waits to see whether others draw, and between two looks.
WAITING, PAUSE = 1.0, 0.002

TORCH, TORCH_CUDA, NUMPY, PYTHON = "torch", "torch on the GPU", "NumPy", "Python's `random`"
_OF_TORCH = {TORCH, TORCH_CUDA}
# Operators of which it is declared whether they draw.
_DECLARED = frozenset({"aten", "prim", "prims", "profiler"})


def without_draws(functional: FunctionalModel, call: Callable[[], Tensor], where: str) -> Tensor:
    """What ``call()``, of the network, gives; it may be called again where other threads draw at the same time.

    Raises:
        ModelError: it moved the random state of torch, NumPy, Python, or of a generator that the model holds.
    """
    own = _generators(functional.model)
    for look in count(1):
        watch = _Draws() if len(sys._current_frames()) > 1 else None
        before = _random_state(functional.device, own)
        with watch or nullcontext():
            out = call()
        moved = _moved(before, _random_state(functional.device, own))
        if not moved:
            break
        if watch is None or watch.seen or not moved <= {*_OF_TORCH, NUMPY, PYTHON}:
            raise _drawn(functional, moved, where)
        if look < LOOKS and moved <= _OF_TORCH and not watch.unknown:
            continue
        if _moving(functional.device, moved):
            break
        doubt = " If another thread draws such numbers now and then, fit again while it does not."
        raise _drawn(functional, moved, where, doubt)
    return out


def _drawn(functional: FunctionalModel, moved: set[str], where: str, doubt: str = "") -> ModelError:
    mend = "Draw them with torch, one for each example, or pass them as inputs."
    if functional.randomness is None:
        mend = (
            'Call `model.eval()`; what is meant to stay random: `randomness="frozen"` freezes torch\'s numbers for '
            "each example, others can be passed as inputs."
        )
    return ModelError(
        f"{where}: the network draws random numbers ({', '.join(sorted(moved))}), however rarely they matter, so its "
        f"outputs are not a function of weights and inputs. {mend}{doubt}"
    )


class _Draws(TorchDispatchMode):
    """Sees what this thread draws from torch's global generators.

    Attributes:
        seen: whether an operation drew from one of them.
        unknown: whether one ran of which it is not declared whether it draws.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.unknown = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or func.namespace not in _DECLARED:
            self.unknown = True
        else:
            given = drawing(func, args, kwargs)
            self.seen |= given is not None and _global(given.get("generator"))
        return func(*args, **kwargs)


def _global(generator: Any) -> bool:
    shared: tuple[Any, ...] = (torch.default_generator, *torch.cuda.default_generators)
    return generator is None or generator._cdata in {each._cdata for each in shared}


def _moving(device: torch.device, names: set[str]) -> bool:
    """Whether the global states ``names`` move while this thread does nothing: then other threads draw."""
    first, still = _random_state(device, {}), set(names)
    until = time.monotonic() + WAITING
    while still and time.monotonic() < until:
        time.sleep(PAUSE)
        still -= _moved(first, _random_state(device, {}))
    return not still


def _moved(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name, state in before.items() if state != after[name]}


def _random_state(device: torch.device, own: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {
        TORCH: torch.random.get_rng_state().numpy().tobytes(),
        PYTHON: random.getstate(),
    }
    numbers = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is what is watched
    assert isinstance(numbers, dict)
    inner = numbers["state"]
    state[NUMPY] = (inner["pos"], inner["key"].tobytes(), numbers["has_gauss"])
    if device.type == "cuda":
        state[TORCH_CUDA] = torch.cuda.get_rng_state(device).numpy().tobytes()
    for name, generator in own.items():
        state[f"the generator `{name}`"] = _state_of(generator)
    return state


def _generators(model: nn.Module) -> dict[str, Any]:
    """Generators that modules hold as attributes, by path."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, kinds)
    }


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)
    return str(generator.get_state(legacy=False))
