"""Heads of distilled modules, the features they see, and the shifts that teach them."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.testing import assert_close

from nullbayes.posterior import heads
from nullbayes.posterior.corruptions import JUDGING, TEACHING, corrupted
from nullbayes.posterior.distilled import Seen, Tap, TappedConv2d, TappedLinear, pooled, tap
from nullbayes.posterior.heads import FineHead, SmallHead, better


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "STEPS", 600)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def known(count: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Features of two layers, and two targets that are functions of them."""
    x = 3 + 5 * torch.randn(count, 4, generator=generator(seed))
    y = torch.randn(count, 3, generator=generator(seed + 1))
    target = torch.stack([(x[:, 0] - 3).abs() / 5 + y[:, 1], 2 * y[:, 0] - 4], 1)
    return [x, y], target


@pytest.mark.parametrize("make", [SmallHead, FineHead])
def test_heads_follow_what_they_were_fitted_to(make: type[heads.Head]) -> None:
    head = make(*known(600, 0), generator())
    features, wanted = known(200, 10)
    found = head(torch.cat(features, 1))
    assert found.shape == (200, 2)
    for ours, theirs in zip(found.T, wanted.T, strict=True):
        assert spearmanr(ours, theirs).statistic > 0.9
    far = head(1e6 * torch.cat(features, 1))
    fitted = known(600, 0)[1]
    assert bool((far <= fitted.amax(0) + heads.MARGIN + 1e-4).all())
    assert bool((far >= fitted.amin(0) - heads.MARGIN - 1e-4).all())


def test_a_head_is_the_same_for_the_same_seed_and_moves_no_random_state() -> None:
    before = torch.get_rng_state()
    features, targets = known(100, 0)
    one, two, other = (SmallHead(features, targets, generator(s)) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    x = torch.cat(features, 1)
    assert torch.equal(one(x), two(x))
    assert not torch.equal(one(x), other(x))


def test_the_head_that_follows_left_out_kinds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = known(300, 0)
    kinds = [0] * 200 + [1] * 50 + [2] * 50
    seen = []

    def made(quality: dict[str, float], name: str) -> type[heads.Head]:
        class Fake(heads.Head):
            def __init__(self, x: list[Tensor], y: Tensor, g: torch.Generator) -> None:
                super().__init__()
                seen.append((name, len(y)))

            def forward(self, x: Tensor) -> Tensor:
                right = (x[:, 0] - 3).abs() / 5 + x[:, 5]
                noise = torch.randn(len(x), generator=generator(3))
                share = quality[name]
                return torch.stack([share * right + (1 - share) * 9 * noise, right], 1)

        return Fake

    for small, fine in ((0.5, 1.0), (1.0, 0.5), (1.0, 1.0)):
        quality = {"small": small, "fine": fine}
        fakes = made(quality, "small"), made(quality, "fine")
        monkeypatch.setattr(heads, "SmallHead", fakes[0])
        monkeypatch.setattr(heads, "FineHead", fakes[1])
        chosen = better(features, targets, kinds, [2], generator())
        assert chosen is (fakes[1] if fine > small else fakes[0])
    assert {count for _, count in seen} == {250}  # those that judge were left out


@pytest.mark.parametrize("shape", [(3, 7), (3, 6, 5), (3, 1, 2)])
def test_features_of_images_are_means_of_quarters_and_sizes(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, *shape, generator=generator())
    means, size = pooled(x)
    assert_close(size, x.flatten(2).square().mean(2).sqrt())
    windows = [max(1, n // 2) for n in shape[1:]]
    first = x[(slice(None), slice(None), *(slice(0, w) for w in windows))]
    count = means.shape[1] // shape[0]
    assert_close(means.reshape(4, shape[0], count)[:, :, 0], first.flatten(2).mean(2))
    flat = torch.randn(4, 5)
    assert pooled(flat)[0] is flat


class Own(nn.Linear):
    """A layer of the user's own."""


def test_layers_note_their_inputs_and_compute_what_they_did() -> None:
    layers: list[tuple[nn.Module, tuple[int, ...], type]] = [
        (nn.Linear(5, 3), (2, 5), TappedLinear),
        (nn.Linear(5, 3, bias=False), (2, 5), TappedLinear),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), (2, 4, 5, 5), TappedConv2d),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (2, 1, 5, 5), TappedConv2d),
        (nn.Conv1d(2, 3, 3), (2, 2, 6), Tap),
        (Own(5, 3), (2, 5), Tap),
    ]
    for layer, shape, kind in layers:
        seen, x = Seen(), torch.randn(shape)
        wanted = layer(x)
        tapped = tap(copy.deepcopy(layer), seen)
        assert type(tapped) is kind
        assert torch.equal(tapped(x), wanted)
        assert len(seen.values) == 1
        assert seen.values[0] is x
        assert torch.equal(tapped.weight, layer.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(6,), (4, 8), (1, 9, 8), (2, 3, 4, 5)])
@pytest.mark.parametrize("kind", TEACHING)
def test_every_way_of_teaching_changes_numbers_of_any_shape(
    kind: str, shape: tuple[int, ...]
) -> None:
    x = torch.rand(5, *shape, generator=generator())
    before = x.clone()
    found = corrupted(x, kind, generator(1))
    assert isinstance(found, Tensor)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert torch.equal(x, before)
    assert not torch.equal(found, x)
    assert bool(found.isfinite().all())
    again = corrupted(x, kind, generator(1))
    assert isinstance(again, Tensor)
    assert torch.equal(found, again)


@pytest.mark.parametrize("kind", TEACHING)
def test_tokens_stay_tokens(kind: str) -> None:
    tokens = torch.randint(5, 90, (6, 12), generator=generator())
    tokens[:, 9:] = 0
    found = corrupted(tokens, kind, generator(1))
    assert isinstance(found, Tensor)
    assert set(found.flatten().tolist()) <= set(tokens.flatten().tolist())
    assert not torch.equal(found, tokens)
    assert not set(TEACHING) & set(JUDGING)
