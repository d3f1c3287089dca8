"""Figures of joint predictions and of intervals against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments import intervals, joint
from experiments.layers.sequences import Encoder
from experiments.tasks import mlp, small_resnet
from nullbayes.datasets import Dataset, Split


def test_joint_log_likelihood() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(5, 20, 3, generator=g, dtype=torch.float64)
    p = p / p.sum(2, keepdim=True)
    y = torch.randint(0, 3, (20,), generator=g)
    found = joint.figures(p, y, seed=3)
    generator = torch.Generator().manual_seed(3)
    anchors = torch.randint(0, 20, (joint.GROUPS, 2), generator=generator).tolist()
    which = torch.randint(0, 2, (joint.GROUPS, joint.LABELS), generator=generator).tolist()
    total = 0.0
    for pair, labels in zip(anchors, which, strict=True):
        chance = torch.ones(5, dtype=torch.float64)  # of all ten labels, under each sample
        for k in labels:
            chance = chance * p[:, pair[k], y[pair[k]]]
        total -= float(chance.mean().log())
    assert found["joint"] == pytest.approx(total / joint.GROUPS / joint.LABELS)
    assert found["nll"] == pytest.approx(
        -float(p.mean(0)[torch.arange(20), y].log().mean()), rel=1e-6
    )


def test_one_network_multiplies_its_marginals() -> None:
    p = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    found = joint.figures(p, y, seed=0)["joint"]
    assert 0.5 < found / 1.0397 < 1.0  # between -log .5 and -log .25, whose mean is 1.04


def test_tables_are_split_without_overlap() -> None:
    data = intervals.split("diabetes", 10)
    rows = torch.cat([data.train.inputs, data.validation.inputs, data.test.inputs])
    assert len(rows.unique(dim=0)) == len(rows)
    assert float(data.train.targets.mean()) == pytest.approx(0, abs=1e-9)


def test_conformal_intervals_by_hand() -> None:
    """Residuals 1 to 19 on the validation part: the 18th, (19 + 1) · .9, is the size."""
    zero = torch.nn.Linear(1, 1, dtype=torch.float64)
    torch.nn.init.zeros_(zero.weight)
    torch.nn.init.zeros_(zero.bias)
    x = torch.zeros(19, 1, dtype=torch.float64)
    validation = Split(x, torch.arange(1.0, 20.0, dtype=torch.float64)[:, None])
    test = Split(x[:4], torch.tensor([[-18.0], [18.0], [18.5], [0.0]], dtype=torch.float64))
    found = intervals.conformal(zero, Dataset("some", validation, validation, test))
    assert found == {"coverage_90": 0.75, "width": 36.0}
    few = replace(validation, inputs=x[:8], targets=validation.targets[:8])
    found = intervals.conformal(zero, Dataset("some", few, few, test))
    assert found["coverage_90"] == 1.0  # of eight residuals none is large enough


def test_a_gaussian_process_covers_what_is_one() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(240, 1, generator=g, dtype=torch.float64) * 6
    y = x.sin() + 0.2 * torch.randn(240, 1, generator=g, dtype=torch.float64)
    parts = [Split(x[a:b], y[a:b]) for a, b in ((0, 80), (80, 90), (90, 240))]
    found = intervals.gaussian_process(Dataset("some", *parts))
    assert 0.8 < found["coverage_90"] < 0.98
    assert found["width"] == pytest.approx(2 * 1.645 * 0.2, rel=0.25)


def test_the_last_block_is_whole_layers_from_the_end() -> None:
    residual = small_resnet(3, widths=(4, 6))
    assert all(n.startswith(("4.", "7.")) for n in joint.last_block(residual))
    weights = dict(residual.named_parameters())
    inside = [n for n in weights if n.startswith(("4.", "7."))]
    assert joint.last_block(residual) == inside
    assert "mix.linear1.weight" in joint.last_block(Encoder(3))
    assert "mix.self_attn.in_proj_weight" not in joint.last_block(Encoder(3))
    assert joint.last_block(mlp(4, 2)) == ["2.weight", "2.bias", "4.weight", "4.bias"]


def test_a_process_around_the_network_keeps_its_outputs() -> None:
    """Samples about the network's own outputs, joint over inputs: the same input twice has one value in each."""
    data = joint.make("breast cancer", 0)
    network = joint.trained(data, 0)
    draws = joint.of_process(network, data, 0)
    x = data.test.inputs[:6]
    found = draws(torch.cat([x, x[:1]]))
    assert found.shape == (joint.SAMPLES, 7, 2)
    torch.testing.assert_close(found[:, 0], found[:, 6], atol=0.05, rtol=0.05)
    gap = (found.mean(0)[:6] - network(x)).detach().abs().max()
    assert float(gap) < 3 * float(found.std(0).max())
