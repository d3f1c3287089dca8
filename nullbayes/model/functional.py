"""The user's model as a pure function of its weights, and batches as inputs and targets.

Nothing here writes to the model: each call gets modules of its own (``private.py``) with other weights and copies of
the buffers, so even a layer that counts its own calls leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from nullbayes.errors import InputError, ModelError, NullBayesError
from nullbayes.model.axes import Axes
from nullbayes.model.batch import (
    Batch,
    Inputs,
    Keyed,
    batch_size,
    changed,
    plain,
    repeated,
    tensor_leaves,
)
from nullbayes.model.bound import bound
from nullbayes.model.checks import check_kind, check_scripted
from nullbayes.model.huggingface import HuggingFace
from nullbayes.model.parameters import HALF, ParameterChoice, ParameterSpace
from nullbayes.model.precision import Unrounded, tolerance, widening
from nullbayes.model.private import Copier, Hooks, Modules
from nullbayes.model.probe import Probe, allowed
from nullbayes.model.ragged import collated, restored, unbatched
from nullbayes.model.randomness import FrozenRandomness, Replay, keyed
from nullbayes.model.reading import Reads
from nullbayes.model.reading import as_tensor_output as as_tensor_output
from nullbayes.model.settling import settle
from nullbayes.model.sharded import check_whole, gathered
from nullbayes.model.smooth import derivable
from nullbayes.model.structure import Layouts
from nullbayes.model.transformer import has_nested
from nullbayes.model.wrapped import without_wrapper

Forward = Callable[[nn.Module, Any], Any]


class FunctionalModel(Reads):
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
        check_scripted(model, space.names)
        check_whole(model, space.names)
        self.model, self.space = model, space
        self.user_forward = forward
        self.layouts, self.randomness = layouts, randomness
        self.conventions = HuggingFace.of(model, passive=forward is not None)
        self.modules = Modules(model)
        self.axes = Axes(self._evaluated)
        # What half-precision tensors are computed in, once that was found to work; None: they stay as they are.
        self.widened: torch.dtype | None = None
        # Whether rounding to half precision on the way (autocast, casts) is left out, once that was found to work; and
        # the precision that the deployed network rounds to, None: the working one.
        self.unrounded = False
        self.rounds_to: torch.dtype | None = None
        # Whether that takes a copy of frozen weights, because the network looks at their dtype.
        self.widened_whole = False
        # Whether transformer encoders give zeros at padded positions, as they do without gradients.
        self.padded = False
        # Looks at the operations of forward passes, innermost, while that is asked for.
        self.watch: AbstractContextManager[Any] | None = None
        # The least precise numbers that a forward pass was seen to compute with.
        self.rounding: torch.dtype = space.dtype
        # Whether the chosen weights are said to be those of a last layer.
        self.last_layer = False
        # Whether gradients by the inputs were once compared with differences.
        self.differentiated = False
        self.probe: Probe | None = None  # what the network said of made-up inputs at the fit
        self._settled = False
        self._shape: _OutputShape | None = None

    @property
    def device(self) -> torch.device:
        return self.space.device

    @property
    def dtype(self) -> torch.dtype:
        return self.space.dtype

    def check_same(self) -> None:
        """Raise `ModelError` where the network is another function than it was, whatever its weights."""
        away = 0.0 if self.probe is None else self.probe.difference(self)
        if away > allowed(self):
            raise ModelError(
                "the network's weights are those that this posterior was fitted around, but its outputs are others "
                f"(by {100 * away:.2g} % of their size, on made-up inputs): look for another version of its class, an "
                "exchanged module or activation, a hook, or a setting that changed since. Restore that, or fit anew."
            )

    def weights(self, *, requires_grad: bool = False) -> dict[str, Tensor]:
        """The trained weights by name, fresh leaves; half precision in the working one, others share storage."""
        current = self.space.current(self.model)
        return {n: t.detach().requires_grad_(requires_grad) for n, t in current.items()}

    def batch(self, inputs: Inputs, size: int | None = None) -> Inputs:
        """``inputs`` with the knowledge which of their tensors have the batch; ``size`` of it, where it is known."""
        if isinstance(inputs, (Batch, Keyed)):
            return inputs
        batch = self.axes.batch(inputs, size)
        if not self._settled:
            self._settled = True
            try:
                settle(self, batch)
            except ModelError:
                self._settled = False  # said again, whoever took the first time for something else
                raise
        return batch

    def computing(self) -> AbstractContextManager[Any]:
        """Within it, operations compute as rows are taken of: unrounded, where that serves."""
        return Unrounded() if self.unrounded else nullcontext()

    def _evaluated(self, inputs: Inputs) -> Tensor:
        """Outputs of inputs that may not fit together, for :class:`Axes`; anything may be raised."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self(self.weights(), self.keyed(inputs)).detach()

    def keyed(self, inputs: Inputs, draws: Sequence[int] = (0,)) -> Inputs:
        """``inputs`` with what freezes their random numbers, each example once for every one of ``draws``."""
        if self.randomness is None:
            return inputs
        inputs = self.batch(inputs)
        return keyed(inputs, batch_size(inputs), self.randomness.seed, draws)

    @property
    def draws(self) -> int:
        """How often each example is there in what `stacked` gives."""
        return 1 if self.randomness is None else self.randomness.draws

    def stacked(self, inputs: Inputs, targets: Any) -> tuple[Inputs, Any]:
        """One batch of training data as the rows see it: with all draws of each example."""
        if self.randomness is None:
            return inputs, targets
        inputs = self.batch(inputs)
        return self.keyed(inputs, range(self.draws)), repeated(
            targets, batch_size(inputs), self.draws
        )

    def drawing(self, inputs: Inputs) -> AbstractContextManager[Any]:
        """Within it, random operations on ``inputs`` that carry keys give the frozen numbers."""
        return Replay(inputs.keys, inputs.seed) if isinstance(inputs, Keyed) else nullcontext()

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        inputs: Inputs,
        hooks: Hooks = (),
        *,
        deployed: bool = False,
    ) -> Tensor:
        """Outputs ``(B, *out)``, in the working precision where the model's own are in half.

        Args:
            hooks: forward hooks by the path of their module; the user's modules never see them.
            deployed: as the network runs by itself, whatever stands in for what has no derivative.
        """
        if isinstance(inputs, Keyed):
            with self.drawing(inputs):
                return self(weights, inputs.inputs, hooks, deployed=deployed)
        given = self._given(inputs)
        if self.modules.shared:
            with self.modules.lent(self._placed(weights), hooks) as lent:
                out = self._run(lent, self.user_forward, given)
        else:
            private, forward, _ = self._copied(weights, hooks, deployed=deployed)
            out = self._run(private, forward, given)
        return self._flat(out, inputs)

    def _copied(
        self, weights: Mapping[str, Tensor], hooks: Hooks = (), *, deployed: bool = False
    ) -> tuple[nn.Module, Forward | None, Copier]:
        """A private copy of the network at ``weights``, its ``forward=``, and what knows what is written to it."""
        private, copier = self.modules.private(
            self._placed(weights),
            hooks,
            widened=self.widened,
            padded=self.padded and not deployed,
            whole=self.widened_whole,
        )
        return private, self.user_forward and copier.rebound(self.user_forward), copier

    def bound(self, weights: Mapping[str, Tensor], hooks: Hooks = ()) -> Callable[[Inputs], Tensor]:
        """``inputs -> outputs`` at these weights, as by calling this, of one private copy for as long as nothing writes
        a state to it: for many small batches, where building a copy for each would cost as much as the network.
        """
        return bound(self, weights, hooks)

    def _run(self, module: nn.Module, forward: Forward | None, given: Any) -> Any:
        sees = getattr(self.watch, "sees", None)
        if sees is not None:
            sees(module)
        with self.computing(), derivable(module, self.device), self.watch or nullcontext():
            return _called(module, forward, given)

    def _given(self, inputs: Inputs) -> Any:
        given = self.taken(plain(inputs))
        if self.widened is not None:
            given = tree_map(widening(self.widened), given)
        return restored(given)

    def _placed(self, weights: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """``weights`` by the identity of the parameter that each stands for, in the dtype that it computes in."""
        wide, masks = self.widened is not None, self.space.masks
        placed = {}
        for n, p in self.model.named_parameters():
            if n in weights:
                weight = weights[n]
                if n in masks:  # no derivative, and no change, where a weight does not take part
                    weight = torch.where(masks[n], weight, p.detach().to(weight.dtype))
                placed[id(p)] = weight if wide else weight.to(p.dtype)
        return placed

    def _flat(self, out: Any, inputs: Inputs) -> Tensor:
        return self._working(self.read(out, inputs))

    def _watched(self, inputs: Inputs, where: str) -> Tensor:
        """Outputs at the trained weights, from a network that has been called before as from a fresh one.

        Raises:
            ModelError: a state that the network keeps between calls changes them.
        """
        if self.modules.shared:
            return self(self.weights(), inputs)
        private, forward, copier = self._copied(self.weights())

        def called() -> Tensor:
            given = self._given(inputs)
            with self.drawing(inputs):
                return self._flat(self._run(private, forward, given), inputs)

        out, written = called(), copier.written()
        if not written:
            return out
        second = called()
        if second.shape != out.shape or not self._as_deployed(second, out):
            raise ModelError(
                f"{where}: two forward passes on the same inputs differ, because the model keeps a state between calls "
                f"(it writes {written[:5]}). Random numbers of NumPy or `random` have the same effect, and "
                '`randomness="frozen"` covers neither. Reset the state in the forward pass, or pass it as an input.'
            )
        return out

    def _working(self, out: Tensor) -> Tensor:
        return out.to(self.space.dtype) if out.dtype in HALF else out

    def outputs(self, inputs: Inputs, where: str = "the inputs") -> Tensor:
        """Outputs ``(B, *out)`` at the trained weights, without a graph.

        Raises:
            InputError: the forward pass fails on these inputs; ``where`` says which they are.
            ModelError: the outputs have no batch axis.
        """
        try:
            with torch.no_grad():
                out = self._watched(inputs, where)
                if self.padded and not self._as_deployed(
                    out, self(self.weights(), inputs, deployed=True)
                ):
                    raise ModelError(
                        f"{where}: `nn.TransformerEncoder` takes another path without gradients (nested tensors) than "
                        "with them on these inputs. Build it with `enable_nested_tensor=False`, or call "
                        "`torch.backends.mha.set_fastpath_enabled(False)`, for deployment as well."
                    )
        except (NullBayesError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(self._explain(inputs, where, error)) from error
        size = batch_size(inputs, where)
        if out.ndim == 0 or len(out) != size:
            self._check_squeezed(inputs, out, size)
            mend = unbatched(plain(inputs), len(out) if out.ndim else 0)
            raise ModelError(
                f"the model returned shape {tuple(out.shape)} for {size} examples ({where}); expected "
                "one entry per example on the first axis. A loss already reduced over the batch has no "
                f"per-example rows: return the outputs themselves, or pass `forward=`.{mend}"
            )
        return out

    def mend_padding(self, inputs: Inputs) -> bool:
        """Where gradients change the outputs, try whether padded positions of transformer encoders are why."""
        if self.padded or self.modules.shared or not has_nested(self.model):
            return False
        with torch.no_grad():
            deployed = self(self.weights(), inputs)
            self.padded = True
            self.padded = self._as_deployed(self(self.weights(), inputs), deployed)
        return self.padded

    def _as_deployed(self, ours: Tensor, deployed: Tensor) -> bool:
        return ours.shape == deployed.shape and bool(
            (ours - deployed).norm() <= tolerance(self.rounding) * deployed.norm()
        )

    def _check_squeezed(self, inputs: Inputs, out: Tensor, size: int) -> None:
        """Say so where the batch axis went away because the batch is one example."""
        if size != 1:
            return
        twice = self.model_output(changed(inputs, lambda t: torch.cat([t, t])))
        if twice is not None and twice.ndim and len(twice) == 2:
            raise ModelError(
                f"one example alone gives outputs of shape {tuple(out.shape)}, two give {tuple(twice.shape)}: the "
                "batch axis of length one is removed on the way. Look for `.squeeze()` without an axis in the "
                "forward pass (or in `forward=`), and name the axis (`.squeeze(-1)`)."
            )

    def model_output(self, inputs: Inputs) -> Tensor | None:
        """Outputs without a graph, or None where the model does not take these inputs."""
        try:
            return self._evaluated(inputs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a model may say to inputs that were never meant for it
            return None

    def remember(self, inputs: Inputs, outputs: Tensor) -> None:
        """Take note of the outputs' shape at the fit, for :meth:`expect_shape`."""
        shapes = tuple(outputs.shape[1:])
        lengths = self._lengths(inputs)
        if self._shape is None:
            self._shape = _OutputShape(shapes, lengths)

    def expect_shape(self, inputs: Inputs, shape: Sequence[int], where: str = "`x`") -> None:
        """Outputs of one example have the shape of the fit, but for axes as long as an axis of the inputs.

        Args:
            shape: of the outputs of one example.

        Raises:
            InputError: another number of axes, or an axis of another length that the inputs do not explain.
        """
        known, shape = self._shape, tuple(shape)
        if known is None or self.layouts is not None:  # a callable loss tells structures apart
            return
        lengths = self._lengths(inputs)
        same = len(shape) == len(known.shape) and all(
            now == then or (now in lengths and then in known.lengths)
            for now, then in zip(shape, known.shape, strict=True)
        )
        if not same:
            raise InputError(
                f"{where}: the model returns shape (B, {', '.join(map(str, shape))}) for these inputs; the posterior "
                f"was fitted on outputs of shape (B, {', '.join(map(str, known.shape))}). Pass inputs like the "
                "training data's, or fit a posterior of its own for this use of the model."
            )

    def _lengths(self, inputs: Inputs) -> frozenset[int]:
        before = 0 if self.conventions is None else self.conventions.before
        return frozenset(n + before for t in tensor_leaves(plain(inputs)) for n in t.shape[1:])

    def _explain(self, inputs: Inputs, where: str, error: Exception) -> str:
        """Why the model's own forward pass may have failed, and the mend."""
        leaves = tensor_leaves(plain(inputs))
        kind = type(plain(inputs)).__name__
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in leaves) or kind
        text = (
            f"{where}: the model's forward pass failed on {found}: {type(error).__name__}: {error}"
        )
        given = plain(inputs)
        mend = collated(given) or unbatched(given, batch_size(inputs))
        if mend:
            return f"{text}.{mend}"
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


@dataclass(frozen=True)
class _OutputShape:
    """Outputs of one example at the fit, and the lengths of the inputs' own axes then."""

    shape: tuple[int, ...]
    lengths: frozenset[int]


def _called(model: nn.Module, forward: Forward | None, inputs: Any) -> Any:
    if forward is not None:
        return forward(model, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def functional_model(
    model: nn.Module,
    parameters: ParameterChoice,
    forward: Forward | None,
    layouts: Layouts | None,
    randomness: FrozenRandomness | None,
) -> FunctionalModel:
    """From a user's arguments. Raises `InputError` or `ModelError` for what cannot be used."""
    model = unwrapped(model, frozen=parameters is not None)
    space = ParameterSpace.from_model(model, parameters)
    return FunctionalModel(model, space, forward, layouts=layouts, randomness=randomness)


def unwrapped(model: Any, *, frozen: bool = True) -> nn.Module:
    """The module itself: ``torch.compile`` and training on several processes wrap it, and hooks need its layers.

    Of a network that is sharded, one with full tensors, made in a call of all processes: see ``sharded.py``.

    Args:
        frozen: tensors that require a gradient may be sharded, too, since other weights are chosen.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` is {type(model).__name__}, expected a torch.nn.Module.")
    inner = without_wrapper(model)
    check_kind(inner)
    return gathered(inner, frozen=frozen)
