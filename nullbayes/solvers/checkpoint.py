"""What goes on while a solver iterates: progress, checkpoints, and where to resume from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nullbayes.errors import StorageError

#: ``(iterations done, residual over the tolerance)``
Report = Callable[[int, float], None]

FORMAT = "nullbayes-checkpoint-1"


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
        self._path = None if path is None else Path(path)
        self._last = time.monotonic()

    def report(self, done: int, reached: float) -> None:
        """Tell how far it is."""
        if self._report is not None:
            self._report(done, reached)

    def offer(self, state: dict[str, Tensor], now: bool = False) -> None:
        """Write a checkpoint if one is due (or ``now``): to a temporary name, then renamed."""
        if self._path is None or not (now or time.monotonic() - self._last >= self._every):
            return
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            every = {**state, **self.carried}
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in every.items()}
            save_file(tensors, temporary, {"format": FORMAT, "problem": self.problem})
            temporary.replace(self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(
                f"the checkpoint {self._path} could not be written ({error}); choose another "
                "`checkpoint=`, or free some space."
            ) from error
        self._last = time.monotonic()

    def resume(self) -> dict[str, Tensor] | None:
        """The state of an earlier, unfinished run of the same problem, if there is one.

        Raises:
            StorageError: the file is of another problem, or cannot be read.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                head = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StorageError(
                f"the checkpoint {self._path} cannot be read ({error}); remove it to start anew."
            ) from error
        if self._before is not None and head.get("problem") == self._before:
            return None
        if head.get("format") != FORMAT or head.get("problem") != self.problem:
            raise StorageError(
                f"the checkpoint {self._path} belongs to another fit (other data, weights, seed or "
                "settings); remove it, or name another file in `checkpoint=`."
            )
        return tensors

    def finish(self) -> None:
        """The work is done: its checkpoint has served."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


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
