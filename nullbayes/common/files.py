"""Files appear whole or not at all, and say when they were changed since they were written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# A temporary file of another machine, or of a process whose number was given anew, is left over after this long.
STALE_SECONDS = 86400.0


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """The name of a temporary file in a folder beside ``path``; the file takes its place at the end of the block.

    Whatever ends the block early, Ctrl-C too, leaves ``path`` as it was and nothing else. What an earlier process left
    when it was killed is removed. The folder has to be there. Two processes may write the same path: the last one to
    finish stands. Raises OSError, or ValueError for a name that no file can have.
    """
    remove_leftovers(path)
    prefix = f"{_prefix(path)}{_here()}-{os.getpid()}-"
    # A folder of its own: whoever writes may make temporary files too (safetensors does), and leave them when killed.
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".part"))
    part = folder / "file"
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        _to_disk(part)
        part.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def checksum(description: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a description and over each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Before a rename: after a power cut the new name must not stand for an empty file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _prefix(path: Path) -> str:
    return f".{path.name[:80]}."


def _here() -> str:
    """This machine, in a few characters: process numbers mean nothing on another one."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of their work on ``path``; nothing of those still at work."""
    with contextlib.suppress(OSError, ValueError):
        for found in path.parent.iterdir():
            if found.name.startswith(_prefix(path)) and found.name.endswith(".part"):
                with contextlib.suppress(OSError):
                    if _is_left_over(found):
                        shutil.rmtree(found)


def _is_left_over(part: Path) -> bool:
    machine, _, rest = part.name.removesuffix(".part").rpartition(".")[2].partition("-")
    number = rest.partition("-")[0]
    if machine == _here() and number.isdigit() and not _runs(int(number)):
        return True
    return time.time() - part.stat().st_mtime > STALE_SECONDS


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere a signal of number 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
