"""One thread per worker: small problems, and xdist already uses every core."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
