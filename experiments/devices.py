"""Where the larger networks are trained and their posteriors fitted: an accelerator, if one is asked for."""

from __future__ import annotations

import os

import torch

#: Read by every process of a run; ``--device`` of the command sets it.
VARIABLE = "NULLBAYES_EXPERIMENTS_DEVICE"


def device() -> torch.device:
    """The CPU, unless the environment names another."""
    return torch.device(os.environ.get(VARIABLE, "cpu"))
