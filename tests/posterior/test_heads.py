"""Heads of distilled modules, the features they see, and the shifts that teach them."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.testing import assert_close

from nullbayes.posterior import heads
from nullbayes.posterior.corruptions import (
    JUDGING,
    TEACHING,
    TEACHING_TOKENS,
    corrupted,
    teaching,
)
from nullbayes.posterior.distilled import Seen, Tap, TappedConv2d, TappedLinear, pooled, tap
from nullbayes.posterior.heads import Head, KernelHead


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


def test_a_head_follows_what_it_was_fitted_to() -> None:
    head = Head(*known(600, 0), generator())
    features, wanted = known(200, 10)
    found = head(torch.cat(features, 1))
    assert found.shape == (200, 2)
    for ours, theirs in zip(found.T, wanted.T, strict=True):
        assert spearmanr(ours, theirs).statistic > 0.9
    fitted = known(600, 0)[1]
    for sign in (1, -1):
        far = head(sign * 1e6 * torch.cat(features, 1))
        assert bool((far <= fitted.amax(0) + heads.MARGIN + 1e-4).all())


def test_a_kernel_head_is_the_gaussian_process_that_predicts_each_example_best() -> None:
    """Against scikit-learn's, refitted without each example in turn; and what it says far away."""
    from sklearn.kernel_ridge import KernelRidge

    features, targets = known(40, 0)
    head = KernelHead(features, targets, generator()).double()
    x, y = torch.cat(features, 1).double(), targets.double()
    wide = torch.tensor([4.0] * 4 + [3.0] * 3, dtype=torch.float64).sqrt()
    z = (x - x.mean(0)) / x.std(0) / wide
    offset = y.quantile(heads.FAR, dim=0)
    apart = torch.pdist(z).square()
    middle = torch.cat([apart, apart]).median()

    def model(width: float, noise: float) -> KernelRidge:
        return KernelRidge(kernel="rbf", gamma=1 / (width * float(middle)), alpha=noise)

    errors = {}
    for width in heads.WIDTHS:
        for noise in heads.NOISES:
            left = []
            for n in range(len(z)):
                others = torch.arange(len(z)) != n
                one = model(width, noise).fit(z[others], (y - offset)[others])
                left.append(torch.as_tensor(one.predict(z[n : n + 1])[0]) - (y - offset)[n])
            errors[width, noise] = float((torch.stack(left).square().mean(0) / y.var(0)).sum())
    best = model(*min(errors, key=lambda k: errors[k])).fit(z, y - offset)
    new = torch.cat(known(20, 10)[0], 1).double()
    wanted = torch.as_tensor(best.predict((new - x.mean(0)) / x.std(0) / wide)) + offset
    assert_close(head(new), wanted, rtol=1e-4, atol=1e-4)
    assert_close(head(1e6 * new), offset.expand(20, 2), rtol=1e-5, atol=1e-5)
    assert spearmanr(head(new)[:, 1].float(), known(20, 10)[1][:, 1]).statistic > 0.9


def test_a_head_is_the_same_for_the_same_seed_and_moves_no_random_state() -> None:
    before = torch.get_rng_state()
    features, targets = known(100, 0)
    one, two, other = (Head(features, targets, generator(s)) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    x = torch.cat(features, 1)
    assert torch.equal(one(x), two(x))
    assert not torch.equal(one(x), other(x))


@pytest.mark.parametrize("shape", [(3, 7), (3, 6, 5), (3, 1, 2)])
def test_features_of_images_are_means_of_quarters(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, *shape, generator=generator())
    means = pooled(x)
    windows = [max(1, n // 2) for n in shape[1:]]
    first = x[(slice(None), slice(None), *(slice(0, w) for w in windows))]
    count = means.shape[1] // shape[0]
    assert_close(means.reshape(4, shape[0], count)[:, :, 0], first.flatten(2).mean(2))
    flat = torch.randn(4, 5)
    assert pooled(flat) is flat


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
        assert torch.equal(seen.values[0], pooled(x))
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


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("kind", [*TEACHING_TOKENS, *JUDGING])
def test_tokens_stay_tokens_and_padding_stays_padding(kind: str, padding: int) -> None:
    tokens = torch.randint(8, 90, (6, 12), generator=generator())
    mask = torch.arange(12) < torch.tensor([12, 9, 7, 5, 8, 11])[:, None]
    tokens[~mask] = padding
    batch = {"input_ids": tokens, "attention_mask": mask.long()}
    before = tokens.clone()
    found = corrupted(batch if padding else tokens, kind, generator(1))
    if padding:
        assert torch.equal(found["attention_mask"], mask.long())
        found = found["input_ids"]
    assert isinstance(found, Tensor)
    assert torch.equal(tokens, before)
    assert bool((found[~mask] == padding).all())
    if kind not in ("inverted", "blended"):
        assert bool((found[mask] != padding).all())
    if kind not in ("inverted", "blended"):  # these draw from the whole range
        assert set(found.flatten().tolist()) <= set(tokens.flatten().tolist())
    assert not torch.equal(found, tokens)


def test_what_judges_is_none_of_what_teaches() -> None:
    assert not (set(TEACHING) | set(TEACHING_TOKENS)) & set(JUDGING)
    tokens = torch.randint(8, 90, (6, 12))
    assert teaching({"input_ids": tokens, "attention_mask": tokens > 9}) == TEACHING_TOKENS
    for batch in (torch.rand(6, 3), {"input_ids": tokens, "more": torch.rand(6, 2)}):
        assert teaching(batch) == TEACHING
        for kind in TEACHING:  # tokens beside numbers change in every one of these ways, too
            corrupted(batch, kind, generator())
