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


class Tied(nn.Module):
    """As language models are: the table is the output layer too, which has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 16, padding_idx=0), nn.Linear(16, 11)
        self.out.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.tanh(self.table(tokens).mean(1)))
        return out


def test_a_padding_row_of_a_tied_table_stays_with_its_bias() -> None:
    """The null space balances a bias against its row: without the row, the bias alone would move outputs."""
    torch.manual_seed(0)
    model = Tied().double().eval()
    with torch.no_grad():
        model.table.weight[0] = torch.randn(16)
    x, y = torch.randint(1, 6, (5, 3)), torch.arange(5)
    posterior = nb.LayerNullSpacePosterior(model, delta=0.0, prior_precision=1.0)
    posterior.fit([(x, y)], progress=False)
    assert posterior.certificate.held
    before = model(x).detach()
    for state in posterior.sample(3):
        assert torch.equal(state["out.bias"][0], model.out.bias[0])
        assert float((state["out.bias"] - model.out.bias.detach())[6:].abs().min()) > 0
        moved = Tied().double()
        moved.load_state_dict(state)
        torch.testing.assert_close(moved(x), before, rtol=0, atol=1e-10)
