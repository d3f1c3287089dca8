"""A digest of a model's tensors: whether it is still the one that was fitted."""

from __future__ import annotations

import hashlib

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
    with torch.no_grad():
        for place, tensor in enumerate((*model.parameters(), *model.buffers()), 1):
            if tensor.device.type == "meta" or not tensor.numel():
                continue
            bits = words(tensor)
            for start in range(0, bits.numel(), _CHUNK):
                part = bits[start : start + _CHUNK].to(torch.int64)
                # Sums of integers wrap around and are the same in any order; the weights tell places apart.
                at = torch.arange(start + 1, start + len(part) + 1, device=part.device)
                total += place * int((part * (2 * at + 1)).sum())
    return total & ((1 << 64) - 1)


def words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, flat: as many of them for each number, two for a complex one."""
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
