"""Many outputs an example: leading directions position by position, and predictions a piece at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.constraints.preserve import resolve_preserve
from nullbayes.jacobian import linearise
from nullbayes.likelihood import Classification, Likelihood
from nullbayes.likelihood.softmax import position_directions
from nullbayes.model.batch import batch_size
from nullbayes.posterior import novelty

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(logits: Tensor, scale: Tensor) -> Tensor:
    """The whole Hessian ``(B, T O, T O)``."""
    p = logits.softmax(-1)
    blocks = (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)) * scale[..., None, None]
    return torch.stack([torch.block_diag(*example) for example in blocks])


@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_leading_directions_over_positions_are_those_of_the_whole_hessian(spread: float) -> None:
    logits, scale = spread * normal(3, 7, 4), normal(3, 7, seed=1).abs()
    scale[1, :3] = 0.0
    values, vectors = torch.linalg.eigh(dense(logits, scale))
    rows, found, trace = position_directions(logits, scale, 5)
    assert rows.shape == (3, 5, 7, 4)
    assert_close(found, values.flip(-1)[:, :5].clamp_min(0), atol=1e-12, rtol=1e-9)
    assert_close(trace, values.sum(-1), atol=1e-12, rtol=1e-9)
    flat = rows.flatten(2)
    leading = vectors.flip(-1)[..., :5] * values.flip(-1)[:, None, :5].clamp_min(0).sqrt()
    assert_close(flat.mT @ flat, leading @ leading.mT, atol=1e-10, rtol=1e-7)


def test_blocks_of_examples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, scale = normal(5, 6, 3), torch.ones(5, 6)
    whole = position_directions(logits, scale, 4)
    monkeypatch.setattr("nullbayes.likelihood.softmax._BLOCK", 6 * 9 * 2)
    for got, wanted in zip(position_directions(logits, scale, 4), whole, strict=True):
        assert_close(got, wanted)


def test_never_more_directions_than_there_are() -> None:
    rows, found, trace = position_directions(normal(2, 3, 4), torch.ones(2, 3), 100)
    assert rows.shape == (2, 9, 3, 4)
    assert_close(found.sum(1), trace)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("directions", [1, 6, "auto"])
@pytest.mark.parametrize("soft", [False, True])
def test_images_take_the_short_way_to_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, axis: int, directions: Any, soft: bool
) -> None:
    likelihood = Classification(class_axis=axis, weight=[1.0, 2.0, 0.5])
    outputs = 4 * normal(4, 3, 5, 2).movedim(1, axis)
    targets = torch.randint(3, (4, 5, 2), generator=torch.Generator().manual_seed(2))
    targets[1, :3], targets[2] = -100, -100  # partly and wholly ignored
    if soft:
        targets = normal(*outputs.shape, seed=3).softmax(axis)
    preserve = resolve_preserve("predictions")
    with monkeypatch.context() as patch:
        patch.delattr(Classification, "hessian_factor")  # its T (O - 1) columns are never formed
        patch.setattr(Likelihood, "hessian_factor", None)
        short = preserve.cotangents(likelihood, outputs, targets, directions)
    monkeypatch.setattr(Classification, "leading_factor", Likelihood.leading_factor)
    long = preserve.cotangents(likelihood, outputs, targets, directions)
    assert short.values.shape == long.values.shape
    one, other = short.values.flatten(2).transpose(0, 1), long.values.flatten(2).transpose(0, 1)
    assert_close(one.mT @ one, other.mT @ other, atol=1e-10, rtol=1e-7)
    assert_close(short.discarded, long.discarded, atol=1e-10, rtol=1e-7)
    assert_close(short.trace, long.trace, atol=1e-10, rtol=1e-7)


@pytest.fixture(scope="module")
def posterior() -> nb.NullSpacePosterior:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)
    ).eval()
    masks = torch.randint(3, (6, 5, 5))
    return nb.NullSpacePosterior(model, preserve="loss").fit(
        [(torch.randn(6, 1, 5, 5), masks)], num_samples=4, progress=False
    )


def test_novelty_of_an_image_needs_no_row_for_each_output(
    posterior: nb.NullSpacePosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(3, 1, 5, 5).float()
    with monkeypatch.context() as patch:
        patch.setattr(novelty, "output_rows", None)
        got = posterior.novelty(x, score="variance", exact=False)
    change = posterior.predict(x).outputs - posterior.predict(x).point
    change = posterior.likelihood.centre(change)
    assert_close(got, change.square().mean(0).flatten(1).sum(1), rtol=1e-4, atol=0)
    monkeypatch.setattr(novelty, "REVERSE_OUTPUTS_PER_SAMPLE", 10**9)
    monkeypatch.setattr(novelty, "forward_mode", None)
    assert_close(posterior.novelty(x, score="variance", exact=False), got, rtol=1e-4, atol=0)


def test_large_outputs_are_predicted_a_piece_at_a_time(
    posterior: nb.NullSpacePosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(5, 1, 5, 5).float()
    whole, sizes, forward = posterior.predict(x).outputs, [], linearise.forward_product

    def noted(functional: Any, tangent: Any, inputs: Any) -> Tensor:
        sizes.append(batch_size(inputs))
        return forward(functional, tangent, inputs)

    monkeypatch.setattr(linearise, "forward_product", noted)
    monkeypatch.setattr(linearise, "examples_per_capture", lambda *_: 2)
    assert_close(posterior.predict(x).outputs, whole)
    assert sizes == [2] * 8 + [1] * 4  # 4 samples of each piece
