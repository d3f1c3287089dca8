"""What goes on while a solver iterates: progress, checkpoints, and where to resume from."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nullbayes.common.files import atomic_file, checksum, remove_leftovers
from nullbayes.common.processes import Processes
from nullbayes.errors import NullBayesWarning, StorageError

#: ``(iterations done, residual over the tolerance)``
Report = Callable[[int, float], None]

FORMAT = "nullbayes-checkpoint-2"
OLD_FORMAT = "nullbayes-checkpoint-1"  # without a checksum


class Watch:
    """Shows progress and writes a checkpoint now and then. The plain one does neither.

    Args:
        report: called after each iteration.
        path: where checkpoints go (safetensors); None: nowhere.
        every: seconds between two checkpoints.
        problem: describes what is being solved; a checkpoint of another problem is refused.
        before: the problem of the part of the work that came before; its checkpoint is overwritten.
    """

    def __init__(
        self,
        report: Report | None = None,
        path: str | os.PathLike[str] | None = None,
        every: float = 60.0,
        problem: str = "",
        before: str | None = None,
    ) -> None:
        self._report, self._every, self.problem, self._before = report, every, problem, before
        #: what else belongs into each checkpoint
        self.carried: dict[str, Tensor] = {}
        #: digest of all that the problem was made from (weights, say): two that differ never fit; "": not told
        self.identity = ""
        #: those that work on it; one writes, and what it reads all of them check
        self.processes: Processes | None = None
        self._warned = False
        self._path = None if path is None else Path(path)
        self._last = time.monotonic()

    def report(self, done: int, reached: float) -> None:
        """Tell how far it is."""
        if self._report is not None:
            self._report(done, reached)

    def offer(self, state: dict[str, Tensor], *, now: bool = False) -> None:
        """Write a checkpoint if one is due (or ``now``): to a temporary name, then renamed.

        Warns:
            NullBayesWarning: once, where it cannot be written. The work goes on, and the last good one stands.
        """
        if self._path is None or not (now or time.monotonic() - self._last >= self._every):
            return
        if self.processes is not None and not self.processes.leads:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            every = {**state, **self.carried}
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in every.items()}
            head = {"format": FORMAT, "problem": self.problem, "identity": self.identity}
            head["checksum"] = checksum(_described(head), tensors)
            with atomic_file(self._path) as part:
                save_file(tensors, part, head)
        except (OSError, ValueError, SafetensorError) as error:  # a name with a NUL is a ValueError
            if not self._warned:
                warnings.warn(
                    f"the checkpoint {self._path} could not be written ({error}); the fit goes on without. Choose "
                    "another `checkpoint=`, or free some space.",
                    NullBayesWarning,
                    stacklevel=2,
                )
            self._warned = True
        self._last = time.monotonic()

    def resume(self) -> dict[str, Tensor] | None:
        """The state of an earlier, unfinished run of the same problem, if there is one.

        Raises:
            StorageError: the file is of another problem, damaged, or cannot be read.
        """
        if self._path is None:
            return None
        processes = self.processes
        found = self._read() if processes is None else processes.shared(self._read)
        if found is None:
            return None
        head, tensors = found
        self._check_whole(head, tensors)
        if self._before is not None and head.get("problem") == self._before:
            return None
        told = head.get("identity", "")
        other = bool(told and self.identity and told != self.identity)
        if head.get("problem") != self.problem or other:
            raise StorageError(
                f"the checkpoint {self._path} belongs to another fit (other data, weights, seed or "
                "settings); remove it, or name another file in `checkpoint=`."
            )
        return tensors

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        """What the file says of itself, and what it holds; None where there is no file."""
        assert self._path is not None
        if not _exists(self._path):
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                head = file.metadata() or {}
                return head, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
            raise StorageError(
                f"the checkpoint {self._path} cannot be read ({error}); remove it to start anew."
            ) from error

    def _check_whole(self, head: dict[str, str], tensors: dict[str, Tensor]) -> None:
        if head.get("format") == FORMAT:
            whole = head.get("checksum") == checksum(_described(head), tensors)
        elif head.get("format") == OLD_FORMAT:
            whole = "checksum" not in head and all(
                bool(t.isfinite().all()) for t in tensors.values()
            )
        else:
            raise StorageError(
                f"{self._path} is not a checkpoint that this version of nullbayes reads (format "
                f"{head.get('format')!r}); remove it, or name another file in `checkpoint=`."
            )
        whole = whole and _has_layout(tensors)
        if not whole:
            raise StorageError(
                f"the checkpoint {self._path} cannot be read (it is not what was written: damaged, or changed since); "
                "remove it to start anew."
            )

    def finish(self) -> None:
        """The work is done: its checkpoint has served."""
        if self._path is not None and (self.processes is None or self.processes.leads):
            with contextlib.suppress(OSError, ValueError):
                self._path.unlink(missing_ok=True)
            remove_leftovers(self._path)


def _has_layout(tensors: dict[str, Tensor]) -> bool:
    """What every iterative solver leaves: samples ``x (S, P)``, steps ``done ()``, and which are ``active (S,)``."""
    x, done, active = (tensors.get(name) for name in ("x", "done", "active"))
    if x is None or done is None or active is None or x.ndim != 2 or done.ndim:
        return False
    anchor = tensors.get("anchor", x)
    return active.dtype == torch.bool and active.shape == x.shape[:1] and anchor.shape == x.shape


def _described(head: dict[str, str]) -> str:
    return "\0".join(head.get(key, "") for key in ("format", "problem", "identity"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no folder to look into, a name that no file can have
        return False


QUIET = Watch()


def describe_problem(*values: object) -> str:
    """One line that two fits share only if they solve the same equations."""
    parts = []
    for value in values:
        if isinstance(value, Tensor):
            parts.append(",".join(f"{v:.3e}" for v in value.flatten().tolist()))
        else:
            parts.append(str(value))
    return "|".join(parts)


def probe_of(columns: int, like: Tensor) -> Tensor:
    """One fixed vector ``(1, columns)``: its product with the rows tells data sets apart."""
    generator = torch.Generator().manual_seed(12345)
    return torch.randn(1, columns, generator=generator, dtype=like.dtype).to(like.device)
