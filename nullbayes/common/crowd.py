"""Weight samples spread over processes: each holds some, and what they do to outputs is everyone's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nullbayes.common.processes import Processes, resolve, spread
from nullbayes.errors import InputError

DATA, SAMPLES = "data", "samples"


@dataclass(frozen=True)
class Crowd:
    """Those that hold the other samples; None: this process has all of them."""

    processes: Processes | None = None

    @staticmethod
    def of(group: Any) -> Crowd:
        """``group``: False: this process alone."""
        return Crowd(resolve(group))

    @contextlib.contextmanager
    def call(self, where: str, asked: dict[str, Any]) -> Iterator[None]:
        """The length of a call that all of them make, with the same ``asked``."""
        if self.processes is None:
            yield
            return
        with self.processes.call(where, asked):
            yield

    def part(self, count: int) -> range:
        """The samples of this process, by number. Raises `InputError` where some process would have none."""
        if self.processes is None:
            return range(count)
        if count < self.processes.size:
            raise InputError(
                f"`num_samples` is {count}, and {self.processes.size} processes share the samples; ask for one each at "
                "least."
            )
        return spread(count, self.processes.size)[self.processes.rank]

    def joined(self, values: Tensor) -> Tensor:
        """``(S', ...)`` of each, one after the other: ``(S, ...)``."""
        return values if self.processes is None else self.processes.joined(values, 0)

    def total(self, value: float) -> float:
        """The sum over all of them."""
        return value if self.processes is None else self.processes.total(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Everyone's."""
        return [value] if self.processes is None else self.processes.gather(value)

    def agree(self, what: str, value: Any) -> None:
        """Raise `ProcessError` where it is not the same in all."""
        if self.processes is not None:
            self.processes.agree({what: value})


ALONE = Crowd()


def groups_of(mesh: Any) -> tuple[Any, Any]:
    """The groups of a device mesh that share the data, and the samples. Raises `InputError` for another mesh."""
    names = getattr(mesh, "mesh_dim_names", None)
    if names is None or set(names) != {DATA, SAMPLES}:
        raise InputError(
            f"`device_mesh` has the dimensions {names}; expected two, named {DATA!r} and {SAMPLES!r}: "
            "`init_device_mesh('cpu', (2, 2), mesh_dim_names=('data', 'samples'))`. A mesh of one "
            "dimension, over which examples are split, is a `process_group=`."
        )
    return mesh.get_group(DATA), mesh.get_group(SAMPLES)
