"""A digest of a model's tensors: whether it is still the one that was fitted."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.errors import ModelError
from nullbayes.model.adapters import ACTIVE, active_adapters, inactive_adapters
from nullbayes.model.bits import bits_of, read, weighted_sums
from nullbayes.model.packed import opened, tensors_of
from nullbayes.model.sharded import check_source, is_stale


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A digest of each parameter and buffer: shape and values, whatever the device or float dtype.

    Values are hashed in float32, so a model agrees with its conversion to float64, and back. Of adapters (peft) those
    that are active count, and under :data:`ACTIVE` stands which they are.
    """
    active = active_adapters(model)
    out = {} if active is None else {ACTIVE: active}
    without = inactive_adapters(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not without.isdisjoint(name.split(".")):
            continue
        for inner, part in opened(tensor).items():
            values = part.detach().cpu()
            if values.is_floating_point():
                values = values.to(torch.float32)
            digest = hashlib.sha256(str(tuple(values.shape)).encode())
            digest.update(values.reshape(-1).contiguous().view(torch.uint8).numpy().data)
            out[f"{name}.{inner}" if inner else name] = digest.hexdigest()[:24]
    return out


def quick_digest(model: nn.Module) -> int:
    """One number from every bit of a model's tensors, at the speed of reading them.

    For changes that PyTorch's version counters do not see: through ``.data``, a NumPy view, another process. Not a
    cryptographic one; :func:`fingerprint` says which tensors differ.
    """
    places, sums = [], []
    for place, tensor in enumerate(tensors_of(model), 1):
        if tensor.device.type != "meta":
            parts = weighted_sums(tensor)
            places += [place] * len(parts)
            sums += parts
    total = sum(place * value for place, value in zip(places, read(sums), strict=True))
    total += zlib.crc32((active_adapters(model) or "").encode())
    return total & ((1 << 64) - 1)


class Watch:
    """Whether a model's tensors and modules are still what they were, for less than a forward pass.

    PyTorch counts the changes that it makes to a tensor itself. Those that go past it (``.data``, a NumPy view) show in
    the sum of a tensor's bits: of all tensors where they are small, of a 64th of a large model at each question. Not a
    substitute for :func:`quick_digest` where an answer has to be certain.

    Args:
        always: numbers that are looked at at each question; None: all of up to a million; of more, a quarter of that.
    """

    def __init__(self, model: nn.Module, always: int | None = None) -> None:
        self.tensors = [t for t in tensors_of(model) if t.device.type != "meta" and t.numel()]
        self.modules = [(m, _entries(m)) for m in model.modules()]
        self.versions, self.active = self._versions(), active_adapters(model)
        # Views of a tensor's bits where there are some, else the tensor and where to look.
        self.pieces: list[tuple[Tensor, Tensor | None, int, int]] = []
        with torch.no_grad():
            for tensor in self.tensors:
                words = bits_of(tensor)
                for start in range(0, len(words), _PIECE):
                    stop = min(len(words), start + _PIECE)
                    view = None
                    if words.data_ptr() == tensor.data_ptr():
                        view = _wide(words[start:stop])
                    self.pieces.append((tensor, view, start, stop))
            self.sums = read([self._sum(*piece) for piece in self.pieces])
        numbers = sum(stop - start for _, _, start, stop in self.pieces)
        if always is None:  # what is large is looked at as a whole within 64 questions
            always = numbers if numbers <= _ALWAYS else _ALWAYS // 4
        self.at_once = max(always, -(-numbers // 64))
        self.next = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of no model: it says of each that it has changed, and holds no tensors."""
        return {"modules": [(None, [])]}

    def same(self, model: nn.Module) -> bool:
        """Whether nothing was found to have changed."""
        if (
            model is not self.modules[0][0]
            or self._versions() != self.versions
            or is_stale(model)
            or any(_entries(m) != entries for m, entries in self.modules)
            or (self.active is not None and active_adapters(model) != self.active)
        ):
            return False
        seen = 0
        places: list[int] = []
        while seen < self.at_once and len(places) < len(self.pieces):
            places.append(self.next)
            seen += self.pieces[self.next][3] - self.pieces[self.next][2]
            self.next = (self.next + 1) % len(self.pieces)
        with torch.no_grad():
            now = [self._sum(*self.pieces[i]) for i in places]
        return read(now) == [self.sums[i] for i in places]

    def _versions(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for t in self.tensors]

    @staticmethod
    def _sum(tensor: Tensor, view: Tensor | None, start: int, stop: int) -> Tensor:
        return (bits_of(tensor)[start:stop] if view is None else view).sum()


def _entries(module: nn.Module) -> list[object]:
    """What a module is made of, by identity, its hooks, and its settings as far as they are plain values."""
    state = module.__dict__
    return [
        module.training,  # of a compiled module it is that of the one inside
        type(module),
        id(state.get("forward")),
        *state["_forward_pre_hooks"],
        None,
        *state["_forward_hooks"],
        *[value for value in state.values() if type(value) in _SETTINGS],
        *map(id, state["_parameters"].values()),
        *map(id, state["_buffers"].values()),
        *map(id, state["_modules"].values()),
    ]


# Attributes that are looked at by value.
_SETTINGS = frozenset({bool, int, float, str})


def _wide(words: Tensor) -> Tensor:
    """The same bits as numbers of 64 bits where they can be read so: their sum takes an eighth of the time."""
    size = words.element_size()
    if size == 8 or words.numel() * size % 8 or words.storage_offset() * size % 8:
        return words
    return words.view(torch.int64)


# Numbers of a piece of a :class:`Watch`, and up to how many all are looked at each time.
_PIECE, _ALWAYS = 2**16, 2**20


def check_unchanged(model: nn.Module, digest: dict[str, str]) -> None:
    """Raise :class:`ModelError` if ``model`` no longer has the fingerprint ``digest``."""
    check_source(model)
    now = fingerprint(model)
    then = digest.get(ACTIVE)
    if then is not None and now.get(ACTIVE) != then:
        raise ModelError(
            f"this posterior was fitted with {then!r} as the active adapters; now they are {now.get(ACTIVE)!r}. Call "
            "`model.set_adapter`, or leave `model.disable_adapter()`; or fit anew."
        )
    # A file of version 0.1 does not say which adapters were active.
    told = {n: d for n, d in now.items() if n in digest or n != ACTIVE}
    changed = sorted(n for n in told if told[n] != digest.get(n))
    if changed:
        raise ModelError(
            f"the model has changed since this posterior was fitted: {len(changed)} tensors differ, "
            f"first {changed[:3]}. Restore the weights that it was fitted for, or fit anew."
        )
