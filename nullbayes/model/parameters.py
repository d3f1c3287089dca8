"""The weights as one flat vector: which tensors take part, and where each of them lies."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.errors import InputError, ModelError, NonFiniteError
from nullbayes.model.packed import opened

HALF = (torch.float16, torch.bfloat16)
# What data-parallel wrappers put before every name.
WRAPPED = "module."
ParameterFilter = Callable[[str, nn.Parameter], bool]
#: which entries of a tensor take part: a boolean tensor of its shape, or True for all of them
Mask = Tensor | bool
ParameterChoice = None | Iterable[str] | Mapping[str, Mask] | ParameterFilter


@dataclass(frozen=True)
class Slot:
    """Where one parameter tensor lies in the flat vector."""

    name: str
    shape: torch.Size
    start: int
    stop: int
    dtype: torch.dtype | None = None  # of the tensor in computations; None: the space's

    @property
    def numel(self) -> int:
        return self.stop - self.start


def _check_filter(choice: Any) -> None:
    """Raise `InputError` for a filter that cannot be called with a name and a parameter."""
    try:
        signature = inspect.signature(choice)
    except (TypeError, ValueError):  # of something built in
        return
    try:
        signature.bind("", None)
    except TypeError as error:
        raise InputError(
            f"`parameters` is a function of {signature}; expected one of a name and a parameter, "
            "`lambda name, parameter: ...`."
        ) from error


class ParameterSpace:
    """The parameter tensors that take part, laid end to end in a vector of ``P`` numbers.

    Tied tensors appear once, under the first name by which the model knows them.
    All tensors share one device. Where dtypes differ, the vector has the widest, and each tensor is computed with in
    its own; half precision counts as float32, since rows in it prove nothing.

    Attributes:
        fixed: coordinates ``(k,)`` that no sample may move, such as the row of an embedding's ``padding_idx``. They
            count as constants: Jacobian rows are zero there, whatever else the network uses them for.
        fixed_rows: the same as rows of tables ``(V, ...)``, by name.
        idle: parameters that stay as a whole, since no output on the training data depends on them.
        masks: by name, which entries of a tensor take part, where not all of them do.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise InputError(
                "`parameters` selects nothing: an empty list, a filter that says no to every name, or "
                "a model without a parameter that requires a gradient. Name some "
                "(`parameters=['head.weight', ...]`) or call `model.requires_grad_(True)`. An adapter of peft is "
                "frozen unless it is loaded with `is_trainable=True`, or while it is disabled."
            )
        devices = sorted({str(t.device) for t in tensors.values()})
        if len(devices) > 1:
            raise ModelError(
                f"all chosen parameters must share one device; found {devices}. Move the model "
                "(`model.to(...)`) or narrow `parameters=`."
            )
        _check_double(devices[0])
        first = next(iter(tensors.values()))
        for name, tensor in tensors.items():
            if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
                raise ModelError(
                    f"parameters must be real floating-point numbers of 16 bits or more; {name!r} is "
                    f"{tensor.dtype}. Leave it out with `parameters=`, or convert the model."
                )
            if tensor.layout != torch.strided:
                raise ModelError(
                    f"{name!r} is stored as {tensor.layout}, where a weight that is zero is no number that could "
                    "change. Convert it (`nn.Parameter(weight.to_dense())`; `torch.nn.utils.prune` keeps zeros of a "
                    "dense one), or leave it out with `parameters=`."
                )
        if any(t.is_inference() for t in tensors.values()):
            raise ModelError(
                "the model's weights were made under `torch.inference_mode()`, which rules out "
                "derivatives for good; build or load the model outside of it."
            )
        wide = {n: _working(t.dtype) for n, t in tensors.items()}
        self.dtype = max(wide.values(), key=lambda dtype: dtype.itemsize)
        self.device = first.device
        slots, start = [], 0
        for name, tensor in tensors.items():
            dtype = None if wide[name] == self.dtype else wide[name]
            slots.append(Slot(name, tensor.shape, start, start + tensor.numel(), dtype))
            start += tensor.numel()
        self.slots = tuple(slots)
        self.by_name = {slot.name: slot for slot in slots}
        self.total = start
        self.fixed = torch.empty(0, dtype=torch.int64, device=self.device)
        self.fixed_rows: dict[str, tuple[int, ...]] = {}
        self.masks: dict[str, Tensor] = {}
        self.idle: tuple[str, ...] = ()

    @property
    def free(self) -> int:
        """``P`` less the coordinates that stay where they are."""
        return self.total - len(self.fixed)

    def fix(self, name: str, rows: Iterable[int]) -> None:
        """Let no sample move the ``rows`` of a table ``(V, ...)``."""
        slot, rows = self.by_name[name], sorted({*rows, *self.fixed_rows.get(name, ())})
        width = slot.numel // max(1, slot.shape[0])
        each = [torch.arange(slot.start + r * width, slot.start + (r + 1) * width) for r in rows]
        self.fixed = torch.cat([self.fixed, *(e.to(self.fixed) for e in each)]).unique()
        self.fixed_rows[name] = tuple(rows)

    def leave(self, name: str) -> None:
        """Let no sample move a parameter, since no output depends on it."""
        slot = self.by_name[name]
        away = torch.arange(slot.start, slot.stop).to(self.fixed)
        self.fixed = torch.cat([self.fixed, away]).unique()
        self.idle = tuple(sorted({*self.idle, name}))

    def rejoin(self) -> None:
        """Take back every :meth:`leave`: other data may depend on these parameters."""
        if self.idle:
            rows, self.fixed, self.idle = self.fixed_rows, self.fixed[:0], ()
            for name, some in rows.items():
                self.fix(name, some)
            for name in self.masks:
                self._fix_masked(name)

    def mask(self, name: str, mask: Tensor) -> None:
        """Let samples move only those entries of a tensor where ``mask``, of its shape, is true."""
        self.masks[name] = mask.detach().to(self.device)
        self._fix_masked(name)

    def _fix_masked(self, name: str) -> None:
        away = (~self.masks[name]).flatten().nonzero()[:, 0] + self.by_name[name].start
        self.fixed = torch.cat([self.fixed, away]).unique()

    def masked_(self, vectors: Tensor) -> Tensor:
        """``vectors (*lead, P)`` with zeros, in place, where masks leave entries out, or no output depends on them."""
        for name, mask in self.masks.items():
            slot = self.by_name[name]
            vectors[..., slot.start : slot.stop] *= mask.flatten()
        for slot in (self.by_name[name] for name in self.idle):
            vectors[..., slot.start : slot.stop] = 0
        return vectors

    def fix_(self, vectors: Tensor) -> Tensor:
        """``vectors (*lead, P)`` with zeros, in place, at the coordinates that stay where they are."""
        # Written only where there is something to write: products of vectors are remembered until these change.
        if len(self.fixed) and bool((vectors[..., self.fixed] != 0).any()):
            vectors[..., self.fixed] = 0
        return vectors

    @classmethod
    def from_model(cls, model: nn.Module, choice: ParameterChoice = None) -> ParameterSpace:
        """Select parameters: all that require a gradient, by names, by a mask for each name, or by a filter."""
        named = dict(model.named_parameters())
        masks = dict(choice) if isinstance(choice, Mapping) else {}
        if choice is None:
            chosen = {n: p for n, p in named.items() if p.requires_grad}
        elif callable(choice):
            _check_filter(choice)
            chosen = {n: p for n, p in named.items() if choice(n, p)}
        else:
            several = not isinstance(choice, str) and isinstance(choice, Iterable)
            given: list[Any] = list(choice) if several else [choice]
            wanted = [name for name in given if isinstance(name, str)]
            if len(wanted) < len(given):
                raise InputError(
                    f"`parameters` is {choice!r}; expected None, names such as 'head.weight', or a "
                    "filter `(name, parameter) -> bool`, or masks `{name: boolean tensor}`."
                )
            aliases = dict(model.named_parameters(remove_duplicate=False))
            canonical = {id(p): n for n, p in named.items()}
            # As a data-parallel wrapper has them.
            wanted = [n if n in aliases else n.removeprefix(WRAPPED) for n in wanted]
            for name in wanted:
                if name not in aliases:
                    near = difflib.get_close_matches(name, aliases, n=3)
                    hint = f" Did you mean {near}?" if near else f" It has {sorted(aliases)}."
                    raise InputError(f"`parameters` names {name!r}, unknown to the model.{hint}")
            keep = {canonical[id(aliases[name])] for name in wanted}
            chosen = {n: p for n, p in named.items() if n in keep}
            masks = {canonical[id(aliases[n])]: _mask(n, m, aliases[n]) for n, m in masks.items()}
        space = cls(chosen)
        for name, rows in padding_rows(model).items():
            if name in space.by_name:
                space.fix(name, rows)
        for name, mask in masks.items():
            if not bool(mask.all()):
                space.mask(name, mask)
        return space

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors ``(*lead, *shape)`` by name -> ``(*lead, P)``."""
        parts = []
        for slot in self.slots:
            t = tensors[slot.name]
            lead = t.shape[: t.ndim - len(slot.shape)]
            parts.append(t.reshape(*lead, slot.numel))
        return torch.cat(parts, dim=-1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """``(*lead, P)`` -> views ``(*lead, *shape)`` by name."""
        if flat.shape[-1] != self.total:
            raise InputError(
                f"a flat weight vector needs {self.total} numbers in its last axis, got shape "
                f"{tuple(flat.shape)}."
            )
        lead = flat.shape[:-1]
        return {
            s.name: flat[..., s.start : s.stop].reshape((*lead, *s.shape)).to(s.dtype or flat.dtype)
            for s in self.slots
        }

    def current(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's present weights by name, detached: views, or float32 copies of half precision."""
        named = dict(model.named_parameters())
        return {
            slot.name: named[slot.name].detach().to(_working(named[slot.name].dtype))
            for slot in self.slots
        }

    def check_finite(self, model: nn.Module) -> None:
        """Raise :class:`NonFiniteError` naming the tensors that hold NaN or infinity.

        Infinity in a buffer is fine: attention masks keep it there.
        """
        bad = [
            name
            for name, t in model.named_parameters()
            if not all(bool(part.isfinite().all()) for part in opened(t).values())
        ]
        bad += [
            name
            for name, t in model.named_buffers()
            if any(bool(part.isnan().any()) for part in opened(t).values())
        ]
        if bad:
            raise NonFiniteError(
                f"the model holds NaN or infinity in {bad}; load a checkpoint whose weights are "
                "finite before asking for a posterior around them."
            )

    def scales(self, precision: Mapping[str, float] | None) -> Tensor | None:
        """Per-weight standard deviations ``(P,)`` from one precision per tensor, or ``None``."""
        if precision is None:
            return None
        unknown = sorted(set(precision) - set(self.names))
        missing = sorted(set(self.names) - set(precision))
        if unknown or missing:
            raise InputError(
                "`prior_precision` needs exactly one value per chosen parameter tensor: "
                f"missing {missing}, unknown {unknown}."
            )
        out = torch.empty(self.total, dtype=self.dtype, device=self.device)
        for slot in self.slots:
            value = float(precision[slot.name])
            if not 0.0 < value < float("inf"):
                raise InputError(
                    f"`prior_precision[{slot.name!r}]` is {value}; it must be positive and finite."
                )
            scale, info = value**-0.5, torch.finfo(self.dtype)
            if not info.tiny <= scale <= info.max:
                raise InputError(
                    f"`prior_precision[{slot.name!r}]` is {value}: its standard deviation {scale:.3g} lies outside "
                    f"what {self.dtype} can hold. Use a value nearer to one, or a float64 model."
                )
            out[slot.start : slot.stop] = scale
        return out


def _mask(name: str, mask: Any, parameter: Tensor) -> Tensor:
    """Which entries of ``parameter`` take part. Raises `InputError` where that cannot be read off ``mask``."""
    if mask is True:
        return torch.ones_like(parameter, dtype=torch.bool)
    right = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == parameter.shape
    if not right:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise InputError(
            f"`parameters[{name!r}]` is {found}; expected a boolean tensor of shape {tuple(parameter.shape)}, True "
            "where a weight takes part, or True for all of them."
        )
    if not bool(mask.any()):
        raise InputError(f"`parameters[{name!r}]` chooses no weight; leave the name out instead.")
    return mask


def _check_double(device: str) -> None:
    """Raise `ModelError` for a device without float64, in which sums are taken and matrices factorised."""
    if torch.device(device).type in ("cpu", "cuda"):
        return
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        raise ModelError(
            f"the model is on {device!r}, which has no float64: rows are proved and factorised in it. Fit on the CPU: "
            "`model.to('cpu')`."
        ) from error


def _working(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a tensor are computed with."""
    return torch.float32 if dtype in HALF else dtype


def padding_rows(model: nn.Module) -> dict[str, set[int]]:
    """Rows that stay where they are, by the canonical name of the table: ``padding_idx`` of embeddings.

    Also where the table is tied to an output layer. PyTorch gives the row a gradient from there and none from the
    lookup, which reads it all the same: a sample that moved it would change what padding is.
    """
    canonical = {id(p): n for n, p in model.named_parameters()}
    rows: dict[str, set[int]] = {}
    for module in model.modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module.padding_idx is None:
            continue
        table = module._parameters.get("weight")
        if table is not None:
            rows.setdefault(canonical[id(table)], set()).add(module.padding_idx % len(table))
    return rows


def standing_notes(model: nn.Module, space: ParameterSpace) -> list[str]:
    """A sentence for parameters that no output depends on, and for each table whose padding rows other layers use."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                users.setdefault(id(p), []).append(f"{path}.{local}".lstrip("."))
    named = dict(model.named_parameters())
    idle = [
        f"No output on the training data depends on {_some(space.idle)}: they stay where they are."
    ]
    return (idle if space.idle else []) + [
        f"Rows {list(rows)} of {name!r} (`padding_idx`) stay where they are, also in {users[id(named[name])]}, which "
        "is the same tensor."
        for name, rows in space.fixed_rows.items()
        if id(named[name]) in users
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more parameters" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
