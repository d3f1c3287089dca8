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


def check_unchanged(model: nn.Module, digest: dict[str, str]) -> None:
    """Raise :class:`ModelError` if ``model`` no longer has the fingerprint ``digest``."""
    now = fingerprint(model)
    changed = sorted(n for n in now if now[n] != digest.get(n))
    if changed:
        raise ModelError(
            f"the model has changed since this posterior was fitted: {len(changed)} tensors differ, "
            f"first {changed[:3]}. Restore the weights that it was fitted for, or fit anew."
        )
