"""The user's model as a pure function of its weights, and batches as inputs and targets.

Nothing here writes to the model: weights are substituted for the length of one call, buffers are
replaced by private copies, so even a layer that counts its own calls leaves no trace.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nullbayes.errors import InputError, ModelError, NullBayesError
from nullbayes.model.batch import Inputs, batch_size, tensor_leaves
from nullbayes.model.parameters import ParameterChoice, ParameterSpace
from nullbayes.model.randomness import FrozenRandomness, Keyed, Replay, keyed, repeated
from nullbayes.model.structure import Layouts

Forward = Callable[[nn.Module, Any], Any]


class _Call(nn.Module):
    """A module whose forward is the user's way of calling theirs."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        # Registering a child does not change it: no mode, flag or hook of the model is touched.
        self.model = model
        self._user_forward = forward
        self.training = model.training

    def forward(self, inputs: Inputs) -> Any:
        if self._user_forward is not None:
            return self._user_forward(self.model, inputs)
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        if isinstance(inputs, tuple):
            return self.model(*inputs)
        return self.model(inputs)


class FunctionalModel:
    """``f(weights, inputs) -> outputs`` of shape ``(B, *out)`` for a trained module.

    Args:
        model: the trained network; it is never written to.
        space: the parameters that take part; the others stay as the model has them.
        forward: ``forward(model, inputs) -> Tensor`` where a plain call does not do.
        layouts: where outputs may be several tensors: they become one, ``(B, D)``, see ``structure.py``.
        randomness: how random numbers drawn by the model are frozen; None: it must not draw any.
    """

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        forward: Forward | None = None,
        layouts: Layouts | None = None,
        randomness: FrozenRandomness | None = None,
    ) -> None:
        self.model, self.space = model, space
        self.user_forward = forward
        self.layouts, self.randomness = layouts, randomness
        self._call = _Call(model, forward)
        # Every place that holds a tensor, each module once: substituted by `functional_call` under
        # several paths, a module used twice would not get its own weights back.
        canonical = {id(p): n for n, p in model.named_parameters()}
        self._places: dict[str, list[str]] = defaultdict(list)
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        for path, module in model.named_modules(prefix="model"):
            for local, parameter in module._parameters.items():
                if parameter is not None:
                    self._places[canonical[id(parameter)]].append(f"{path}.{local}")
            for local, buffer in module._buffers.items():
                if buffer is not None:
                    self._buffers[f"{path}.{local}"] = (module, local)

    @property
    def device(self) -> torch.device:
        return self.space.device

    @property
    def dtype(self) -> torch.dtype:
        return self.space.dtype

    def weights(self, *, requires_grad: bool = False) -> dict[str, Tensor]:
        """The trained weights by name; fresh leaves that share storage with the model's."""
        current = self.space.current(self.model)
        return {n: t.detach().requires_grad_(requires_grad) for n, t in current.items()}

    def keyed(self, inputs: Inputs, draws: Sequence[int] = (0,)) -> Inputs:
        """``inputs`` with what freezes their random numbers, each example once for every one of ``draws``."""
        if self.randomness is None:
            return inputs
        return keyed(inputs, batch_size(inputs), self.randomness.seed, draws)

    def stacked(self, inputs: Inputs, targets: Any) -> tuple[Inputs, Any]:
        """One batch of training data as the rows see it: with all draws of each example."""
        if self.randomness is None:
            return inputs, targets
        draws = self.randomness.draws
        return self.keyed(inputs, range(draws)), repeated(targets, batch_size(inputs), draws)

    def drawing(self, inputs: Inputs) -> AbstractContextManager[Any]:
        """Within it, random operations on ``inputs`` that carry keys give the frozen numbers."""
        return Replay(inputs.keys, inputs.seed) if isinstance(inputs, Keyed) else nullcontext()

    def __call__(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        if isinstance(inputs, Keyed):
            with self.drawing(inputs):
                return self(weights, inputs.inputs)
        swap = {place: t for n, t in weights.items() for place in self._places[n]}
        for place, (module, local) in self._buffers.items():
            buffer = module._buffers[local]  # as it is now: a checkpoint may have been loaded since
            if buffer is not None:
                swap[place] = buffer.detach().clone()
        out = torch.func.functional_call(self._call, swap, (inputs,), tie_weights=False)
        if self.layouts is not None:
            return self.layouts.flatten(out, batch_size(inputs))
        return as_tensor_output(out)

    def outputs(self, inputs: Inputs, where: str = "the inputs") -> Tensor:
        """Outputs ``(B, *out)`` at the trained weights, without a graph.

        Raises:
            InputError: the forward pass fails on these inputs; ``where`` says which they are.
            ModelError: the outputs have no batch axis.
        """
        try:
            with torch.no_grad():
                out = self(self.weights(), inputs)
        except (NullBayesError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(self._explain(inputs, where, error)) from error
        size = batch_size(inputs, where)
        if out.ndim == 0 or len(out) != size:
            raise ModelError(
                f"the model returned shape {tuple(out.shape)} for {size} examples ({where}); expected "
                "one entry per example on the first axis. A loss already reduced over the batch has no "
                "per-example rows: return the outputs themselves, or pass `forward=`."
            )
        return out

    def _explain(self, inputs: Inputs, where: str, error: Exception) -> str:
        """Why the model's own forward pass may have failed, and the mend."""
        leaves = tensor_leaves(inputs.inputs if isinstance(inputs, Keyed) else inputs)
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in leaves) or type(inputs).__name__
        text = (
            f"{where}: the model's forward pass failed on {found}: {type(error).__name__}: {error}"
        )
        other = sorted({str(t.dtype) for t in leaves if t.is_floating_point()} - {str(self.dtype)})
        if other:
            return (
                f"{text}. The inputs are {', '.join(other)}, the weights {self.dtype}: convert the "
                f"inputs (`x.to({self.dtype})`) or the model (`model.to({other[0]})`)."
            )
        return (
            f"{text}. Expected what the model was trained on, the batch on the first axis of each "
            "tensor; a tuple is passed as arguments, a mapping as keyword arguments, and "
            "`forward=lambda model, inputs: ...` calls a model that needs something else."
        )


def functional_model(
    model: nn.Module,
    parameters: ParameterChoice,
    forward: Forward | None,
    layouts: Layouts | None,
    randomness: FrozenRandomness | None,
) -> FunctionalModel:
    """From a user's arguments. Raises `InputError` or `ModelError` for what cannot be used."""
    model = unwrapped(model)
    space = ParameterSpace.from_model(model, parameters)
    return FunctionalModel(model, space, forward, layouts=layouts, randomness=randomness)


def unwrapped(model: Any) -> nn.Module:
    """The module itself: ``torch.compile`` wraps it, and hooks need its layers."""
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` is {type(model).__name__}, expected a torch.nn.Module.")
    return getattr(model, "_orig_mod", model)


def as_tensor_output(value: Any) -> Tensor:
    """The tensor in what a model returned: itself, or ``logits`` of a mapping or an object."""
    if isinstance(value, Tensor):
        return value
    logits = value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ModelError(
        f"the model returned {type(value).__name__}, expected a tensor or an object with `.logits`."
        " Pass `forward=lambda model, inputs: ...` that returns the tensor to be trusted, or `loss=`, a"
        " callable that takes whatever the model returns."
    )


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Derivatives whatever mode the caller is in, and global random state put back at the end.

    A model that draws random numbers is refused, but has drawn by then; a shuffling loader draws too.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=cuda):
        yield


Method = TypeVar("Method", bound=Callable[..., Any])


def undisturbed_method(method: Method) -> Method:
    """Decorator: run a method of an object with a ``functional`` inside :func:`undisturbed`."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with undisturbed(self.functional.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)
