"""Fits on several processes: there is nothing to call.

Under an initialised process group of `torch.distributed` (torchrun, SLURM, Lightning, Accelerate and Ray start one)
``fit``, ``plan``, ``calibrate``, ``evaluate``, ``predict(loader)`` and ``novelty(loader)`` use every process. Data are
split by index; what can only be iterated is split by its owner, who says so with `Shard`.
"""

from __future__ import annotations

from nullbayes.errors import ProcessError as ProcessError
from nullbayes.model.shares import Shard as Shard
