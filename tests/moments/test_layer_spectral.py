"""Sums over patches by Fourier coefficients are those of patches written out, whatever the convolution."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.moments import spectral
from nullbayes.moments.convolution import ConvSummer
from nullbayes.moments.rule import Summed
from nullbayes.moments.spectral import Axis, SpectralSums

CONVOLUTIONS = {
    "3x3": nn.Conv2d(16, 4, 3, padding=1),
    "no padding": nn.Conv2d(17, 4, 3),
    "1x3": nn.Conv2d(16, 4, (1, 3), padding="same"),
    "4x1, same": nn.Conv2d(16, 4, (4, 1), padding="same", bias=False),
    "5x2, dilated": nn.Conv2d(16, 4, (5, 2), padding=(3, 1), dilation=(1, 3)),
    "3x3, dilated": nn.Conv2d(16, 4, 3, padding=2, dilation=2),
    "more padding than taps": nn.Conv2d(16, 4, 2, padding=3),
    "reflect": nn.Conv2d(16, 4, 3, padding=2, padding_mode="reflect"),
    "replicate, same": nn.Conv2d(16, 4, (2, 3), padding="same", padding_mode="replicate"),
    "circular, groups": nn.Conv2d(36, 4, 3, padding=1, groups=2, padding_mode="circular"),
    "groups": nn.Conv2d(48, 6, 3, padding=1, groups=3),
}
# Examples and maps: even, odd and uneven sizes, and a map that is hardly wider than the kernels.
MAPS = ((9, 10, 11), (8, 12, 9), (8, 8, 8), (3, 9, 9))


def dense(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ a aᵀ (G, I, I)`` and ``Σ a (G, I)`` by unfold, float64."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x.double(), conv._reversed_padding_repeated_twice, mode=mode)
    a = F.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    a = a.movedim(1, 2).flatten(0, 1).unflatten(1, (conv.groups, -1)).transpose(0, 1)
    return a.mT @ a, a.sum(1)


def joined(found: list[Summed]) -> tuple[Tensor, Tensor, int]:
    gram = torch.stack([s.gram.double() for s in found]).sum(0)
    totals = torch.stack([s.sums.double() for s in found]).sum(0)
    return gram, totals, sum(s.count for s in found)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sums_equal_those_of_patches(name: str, dtype: torch.dtype) -> None:
    conv = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(1)
    summer = ConvSummer(conv, dtype)
    assert summer.spectral is not None
    gram, totals, count = torch.zeros(()), torch.zeros(()), 0
    for n, height, width in MAPS:
        x = torch.randn(n, conv.in_channels, height, width, generator=generator) + 0.5
        out = conv(x)
        assert summer.add(conv, (x,), {}, out)
        more = dense(conv, x)
        gram, totals, count = gram + more[0], totals + more[1], count + out[:, 0].numel()
    # The road taken: where it is less work, at the least for 3 × 3.
    assert summer.spectral.count > 0 or name in ("1x3", "4x1, same")
    found = joined(list(summer.flush()))
    assert found[2] == count
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert (found[0] - gram).abs().max() <= tolerance * gram.abs().max()
    if conv.bias is not None:
        assert (found[1] - totals).abs().max() <= tolerance * gram.abs().max()
    assert list(summer.flush()) == []


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spectral, "_PIECE_BYTES", 2**12)
    monkeypatch.setattr(spectral, "_PRODUCT_BYTES", 2**12)
    monkeypatch.setattr(spectral, "_TOGETHER", 3)
    monkeypatch.setattr(spectral, "_ROWS", 200)
    yield


@pytest.mark.parametrize("name", ["3x3", "no padding", "groups"])
def test_sums_in_pieces_and_widened_on_the_way(name: str, small_pieces: None) -> None:
    conv = CONVOLUTIONS[name]
    around = 1 if conv.padding != (0, 0) else 0
    axis = Axis(3, 1, around, around)
    sums = SpectralSums((axis, axis), conv.groups, torch.float64, biased=True)
    x = torch.randn(5, conv.in_channels, 7, 9, generator=torch.Generator().manual_seed(2)).double()
    for part in (x[:2], x[2:]):
        sums.add(part)
    gram, totals, count = joined(sums.flush())
    want = dense(conv, x)
    torch.testing.assert_close(gram, want[0], rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(totals, want[1], rtol=1e-11, atol=1e-9)
    assert count == conv(x[:, :].float())[:, 0].numel()


def test_what_pays() -> None:
    axis = Axis(3, 1, 1, 1)
    sums = SpectralSums((axis, axis), 1, torch.float32, biased=False)
    assert all(sums.pays(64, (n, n)) for n in (32, 16, 8, 4))
    assert not sums.pays(2, (32, 32))  # few examples
    assert not sums.pays(64, (2, 32))  # some pair of taps meets at no position
    point = Axis(1, 1, 0, 0)
    assert not SpectralSums((point, point), 1, torch.float32, biased=False).pays(64, (32, 32))


def test_infinity_shows() -> None:
    axis = Axis(3, 1, 1, 1)
    sums = SpectralSums((axis, axis), 1, torch.float32, biased=False)
    assert sums.mark() is None
    x = torch.zeros(8, 16, 6, 6)
    x[7, 15, 5, 5] = torch.inf
    sums.add(x)
    mark = sums.mark()
    assert mark is not None and not bool(mark.isfinite())
