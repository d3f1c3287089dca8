"""Rows of padding stay where they are in samples of the layer posterior, too."""

from __future__ import annotations

import torch
from torch import nn

import nullbayes as nb


def test_a_padding_row_that_no_example_reads_stays() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, padding_idx=0)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(12, 3)).double().eval()
    x, y = torch.randint(2, 6, (40, 3)), torch.arange(40) % 3
    posterior = nb.LayerNullSpacePosterior(model).fit([(x, y)], progress=False)
    for state in posterior.sample(3):
        moved = (state["0.weight"] - table.weight.detach()).abs().amax(1)
        assert float(moved[0]) == 0.0
        assert float(moved[8]) > 0.0  # nor read, and no padding
