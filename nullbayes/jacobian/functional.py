"""The user's model as a pure function of its weights, and batches as inputs and targets.

Nothing here writes to the model: weights are substituted for the length of one call, buffers are
replaced by private copies, so even a layer that counts its own calls leaves no trace.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from nullbayes.errors import InputError, ModelError, NonFiniteError, NullBayesError
from nullbayes.jacobian.outputs import Layouts
from nullbayes.jacobian.parameters import ParameterSpace
from nullbayes.jacobian.randomness import FrozenRandomness, Keyed, Replay, keyed, repeated

Inputs = Any
Forward = Callable[[nn.Module, Any], Any]
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


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
        layouts: where outputs may be several tensors: they become one, ``(B, D)``, see ``outputs.py``.
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

    def weights(self, requires_grad: bool = False) -> dict[str, Tensor]:
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


def split_batch(batch: Any, where: str, unlabelled: bool = False) -> tuple[Inputs, Any]:
    """One batch of a loader as ``(inputs, targets)``.

    ``(x, y)`` gives ``x, y``; ``(x1, x2, y)`` gives ``(x1, x2), y``; a mapping gives its entry
    named ``labels`` (or ``label``, ``targets``, ``target``, ``y``) as targets, and the rest.

    Args:
        unlabelled: inputs may come alone, ``x``, ``(x,)``, ``(x, None)`` or a mapping; they are the targets then.
    """
    if unlabelled:
        if isinstance(batch, (list, tuple)) and len(batch) == 1:
            return batch[0], batch[0]
        alone = isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS)
        if isinstance(batch, Tensor) or alone:
            return batch, batch
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise InputError(
            f"{where} is a mapping with keys {sorted(map(str, batch))}; none of {TARGET_KEYS} "
            "holds the targets. Rename one in the collate function."
        )
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch) >= 2:
        *inputs, targets = batch
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), targets
    found = type(batch).__name__
    if isinstance(batch, (list, tuple)):
        found = f"a {found} of length {len(batch)}"
    raise InputError(
        f"{where} is {found}; expected (inputs, targets), several inputs followed "
        f"by targets, or a mapping with one of {TARGET_KEYS}. Wrap the data set accordingly."
    )


def batches(
    loader: Iterable[Any], device: torch.device, name: str, free: bool = False
) -> Iterator[tuple[int, Inputs, Any]]:
    """``(index, inputs, targets)`` on ``device``; an empty loader is an :class:`InputError`.

    Args:
        free: targets may be anything, or missing: then they are the inputs (``loss=`` as a callable).
    """
    index = -1
    for index, batch in enumerate(loader):
        where = f"{name}, batch {index}"
        inputs, targets = split_batch(batch, where, free)
        if free:
            targets = inputs if targets is None else targets
        elif not isinstance(targets, Tensor):
            try:
                targets = torch.as_tensor(targets)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{where}: targets are {type(targets).__name__}, expected a tensor."
                ) from error
        inputs = to_device(inputs, device)
        check_inputs(inputs, where)
        yield index, inputs, to_device(targets, device)
    if index < 0:
        raise InputError(
            f"`{name}` yields no batches. A generator can be read only once: pass a DataLoader or "
            "a list of batches; and mind `drop_last=True` on a set smaller than one batch."
        )


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """All tensors of a nested input on ``device``; mappings become plain dicts."""
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    return tree_map(lambda t: _placed(t, device) if isinstance(t, Tensor) else t, inputs)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``, and fit for derivatives where it was made under ``torch.inference_mode``."""
    tensor = tensor.to(device)
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Derivatives whatever mode the caller is in, and global random state put back at the end.

    A model that draws random numbers is refused, but has drawn by then; a shuffling loader draws too.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=cuda):
        yield


def check_inputs(inputs: Inputs, where: str) -> None:
    """Raise :class:`NonFiniteError` if a floating-point input holds NaN or infinity."""
    for leaf in tensor_leaves(inputs):
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            finite = leaf.isfinite().reshape(leaf.shape[0], -1).all(1) if leaf.ndim else None
            row = "" if finite is None else f" (first in example {int((~finite).nonzero()[0])})"
            raise NonFiniteError(
                f"{where}: the inputs hold NaN or infinity{row}. Clean or impute the data first."
            )


def tensor_leaves(inputs: Inputs) -> list[Tensor]:
    """All tensors of a nested input."""
    return [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]


def batch_size(inputs: Inputs, where: str = "the batch") -> int:
    """Length of the leading axis of the first tensor."""
    for leaf in tensor_leaves(inputs):
        if leaf.ndim:
            return int(leaf.shape[0])
    raise InputError(
        f"{where} holds no tensor with a batch axis; found {type(inputs).__name__}. Convert it first "
        "(`torch.as_tensor(...)`, or a collate function that makes tensors)."
    )


def take(inputs: Inputs, start: int, stop: int, size: int | None = None) -> Inputs:
    """Examples ``start:stop`` of ``size``: every tensor that has the batch axis is cut, the rest is kept."""
    size = batch_size(inputs) if size is None else size
    return tree_map(
        lambda t: t[start:stop] if isinstance(t, Tensor) and t.ndim and len(t) == size else t,
        inputs,
    )


def select(inputs: Inputs, index: Tensor) -> Inputs:
    """The examples at ``index (k,)``: every tensor that has the batch axis is indexed, the rest is kept."""
    size = batch_size(inputs)
    return tree_map(
        lambda t: t[index] if isinstance(t, Tensor) and t.ndim and len(t) == size else t, inputs
    )


def check_mode(model: nn.Module, frozen: bool = False) -> None:
    """Refuse modules whose training mode ties examples together or, unless ``frozen``, makes outputs random."""

    def random(module: nn.Module) -> bool:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return module.p > 0
        return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0

    noisy = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module.training
        and (isinstance(module, nn.modules.batchnorm._BatchNorm) or (random(module) and not frozen))
    ]
    if noisy:
        raise ModelError(
            f"the model is in training mode: {noisy[:5]} would make its outputs random or tie the "
            "examples of a batch together. Call `model.eval()` first (dropout that is meant to stay: "
            '`randomness="frozen"`).'
        )
    batch_tied = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        and module.running_mean is None
    ]
    if batch_tied:
        raise ModelError(
            f"{batch_tied[:5]} keep no running statistics (`track_running_stats=False`), so each "
            "output depends on the whole batch and no per-example guarantee exists. Use running "
            "statistics, GroupNorm or LayerNorm."
        )
    renormed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    if renormed:
        raise ModelError(
            f"{renormed} rewrite their own weights during a forward pass (`max_norm`). Renormalise "
            "once, then set `max_norm=None`."
        )


Method = TypeVar("Method", bound=Callable[..., Any])


def undisturbed_method(method: Method) -> Method:
    """Decorator: run a method of an object with a ``functional`` inside :func:`undisturbed`."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with undisturbed(self.functional.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)
