"""A digest of a model's tensors: whether it is still the one that was fitted."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.errors import ModelError


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A digest of each parameter and buffer: shape and values, whatever the device or float dtype.

    Values are hashed in float32, so a model agrees with its conversion to float64, and back.
    """
    out = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        values = tensor.detach().cpu()
        if values.is_floating_point():
            values = values.to(torch.float32)
        digest = hashlib.sha256(str(tuple(values.shape)).encode())
        digest.update(values.contiguous().numpy().tobytes())
        out[name] = digest.hexdigest()[:24]
    return out


# Numbers of a tensor that `quick_digest` holds a 64-bit copy of at a time.
_CHUNK = 2**20


def quick_digest(model: nn.Module) -> int:
    """One number from every bit of a model's tensors, at the speed of reading them.

    For changes that PyTorch's version counters do not see: through ``.data``, a NumPy view, another process. Not a
    cryptographic one; :func:`fingerprint` says which tensors differ.
    """
    total = 0
    for place, tensor in enumerate((*model.parameters(), *model.buffers()), 1):
        if tensor.device.type != "meta":
            total += place * digest(tensor)
    return total & ((1 << 64) - 1)


def digest(tensor: Tensor) -> int:
    """One number from every bit of a tensor."""
    total = 0
    with torch.no_grad():
        words = bits_of(tensor)
        for start in range(0, words.numel(), _CHUNK):
            part = words[start : start + _CHUNK].to(torch.int64)
            # Sums of integers wrap around and are the same in any order; the weights tell places apart.
            at = torch.arange(start + 1, start + len(part) + 1, device=part.device)
            total += int((part * (2 * at + 1)).sum())
    return total


class Watch:
    """Whether a model's tensors are still what they were, for less than a forward pass.

    PyTorch counts the changes that it makes to a tensor itself. Those that go past it (``.data``, a NumPy view) show in
    the sum of a tensor's bits: of all tensors up to 128 MB, of a 64th of a larger model at each question. Not a
    substitute for :func:`quick_digest` where values may have changed places.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.tensors = [t for t in tensors if t.device.type != "meta" and t.numel()]
        self.state = self._state(model)
        # Views of a tensor's bits where there are some, else the tensor and which of its words; and how many words.
        self.pieces: list[tuple[Tensor, Tensor | None, int, int]] = []
        self.lengths: list[int] = []
        with torch.no_grad():
            for tensor in self.tensors:
                for which, words in enumerate(words_of(tensor)):
                    own = words.untyped_storage().data_ptr()
                    viewed = own == tensor.untyped_storage().data_ptr()
                    for start in range(0, len(words), _PIECE):
                        view = words[start : start + _PIECE]
                        self.pieces.append((tensor, view if viewed else None, which, start))
                        self.lengths.append(len(view))
            self.sums = [int(self._sum(*piece)) for piece in self.pieces]
        self.at_once = max(_ALWAYS, sum(self.lengths) // 64)
        self.next = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of no model: it says of each that it has changed, and holds no tensors."""
        return {"state": None}

    def same(self, model: nn.Module) -> bool:
        """Whether nothing was found to have changed."""
        if self._state(model) != self.state:
            return False
        seen = 0
        places: list[int] = []
        while seen < self.at_once and len(places) < len(self.pieces):
            places.append(self.next)
            seen += self.lengths[self.next]
            self.next = (self.next + 1) % len(self.pieces)
        with torch.no_grad():
            now = [self._sum(*self.pieces[i]) for i in places]
        return [int(n) for n in now] == [self.sums[i] for i in places]

    @staticmethod
    def _state(model: nn.Module) -> list[tuple[int, int, int]]:
        return [
            (id(t), t.data_ptr() if t.device.type != "meta" else 0, t._version)
            for t in (*model.parameters(), *model.buffers())
        ]

    @staticmethod
    def _sum(tensor: Tensor, view: Tensor | None, which: int, start: int) -> Tensor:
        return (words_of(tensor)[which][start : start + _PIECE] if view is None else view).sum()


# Words of a piece of a :class:`Watch` (2 MB, which a cache holds), and how many are looked at each time.
_PIECE, _ALWAYS = 2**18, 2**24


def words_of(tensor: Tensor) -> list[Tensor]:
    """The bits of a tensor as 64-bit integers, flat, and what is left over.

    Summing them goes at the speed of memory; narrower ones are widened one by one, forty times slower.
    """
    bits = bits_of(tensor)
    each = 8 // bits.element_size()
    whole = bits.numel() // each * each
    # A view of another width begins where such a number may.
    if each == 1 or bits.dtype == torch.bool or bits.storage_offset() % each:
        return [bits]
    return [part for part in (bits[:whole].view(torch.int64), bits[whole:]) if part.numel()]


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, flat: one for each number, two for a complex one."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    if not flat.is_floating_point():
        return flat
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.contiguous().view(kinds[flat.element_size()])


def check_unchanged(model: nn.Module, digest: dict[str, str]) -> None:
    """Raise :class:`ModelError` if ``model`` no longer has the fingerprint ``digest``."""
    now = fingerprint(model)
    changed = sorted(n for n in now if now[n] != digest.get(n))
    if changed:
        raise ModelError(
            f"the model has changed since this posterior was fitted: {len(changed)} tensors differ, "
            f"first {changed[:3]}. Restore the weights that it was fitted for, or fit anew."
        )
