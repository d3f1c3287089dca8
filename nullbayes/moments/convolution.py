"""Convolutions: the input of the kernel is a patch, one for each position of the output."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nullbayes.moments.rule import InputRule, Layout, Read, Seen, Summed, Summer, argument, register
from nullbayes.moments.shifts import PatchSums, ShiftedSums
from nullbayes.moments.spectral import Axis, SpectralSums

# Bytes of patches written out at a time.
_PATCH_BYTES = 2**25
# Bytes of products of pairs of slices, up to which these are summed instead of patches.
_SLICE_BYTES = 2**27
# From so many channels a group on, and up to so many groups, products of shifted inputs are the least work.
_MANY_CHANNELS, _FEW_GROUPS = 16, 4


def _pieces(x: Tensor, each: int) -> Iterator[Tensor]:
    """``x (N, ...)`` in parts whose patches, ``each`` numbers an example, stay small; whole in a graph being traced."""
    if torch.compiler.is_compiling():
        yield x
        return
    step = max(1, _PATCH_BYTES // max(1, each * x.element_size()))
    for start in range(0, len(x), step):
        yield x[start : start + step]


def _batched(x: Tensor, spatial: int) -> Tensor:
    """With a batch axis, which a single example may come without."""
    return x if x.ndim == spatial + 2 else x.unsqueeze(0)


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What the kernel sees at each position, ``(N, Ch, *positions, *K)``, a view of ``x``, which is already padded."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    return x


def _inputs(seen: Tensor, groups: int) -> Tensor:
    """Patches ``(N, Ch, *positions, *K)`` as ``(N, T, G, I)``."""
    spatial = (seen.ndim - 2) // 2
    n, channels = seen.shape[:2]
    rows = seen.movedim(1, 1 + spatial)  # (N, *positions, Ch, *K)
    count = math.prod(seen.shape[2 : 2 + spatial])
    inputs = channels // groups * math.prod(seen.shape[2 + spatial :])
    return rows.reshape(n, count, groups, inputs)


def padded(module: Any, x: Tensor) -> Tensor:
    """``x`` as the kernel of a convolution sees it."""
    # PyTorch keeps the amount of padding per side, last axis first, also for "same".
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return pad(x, module._reversed_padding_repeated_twice, mode=mode)


def middles(positions: Sequence[int], at_most: int) -> list[tuple[int, int, int]]:
    """About ``at_most`` positions, evenly spaced: by axis the first, the step and how many.

    The middle of each stretch; where an axis is shorter than a stretch, its own middle.
    """
    step = math.ceil((math.prod(positions) / at_most) ** (1 / len(positions)))
    starts = [min(step, n) // 2 for n in positions]
    return [
        (start, step, math.ceil((n - start) / step))
        for start, n in zip(starts, positions, strict=True)
    ]


@functools.lru_cache(256)
def places_of(positions: torch.Size, at_most: int) -> list[tuple[int, int, int]]:
    """The same, remembered."""
    return middles(positions, at_most)


def _picked(module: Any, x: Tensor, places: Sequence[tuple[int, int, int]]) -> Tensor:
    """Inputs ``(N, T, G, I)`` at some positions, looked up by their places in memory: in one step."""
    if len(x) == 1 and module.groups == 1:
        return _picked_of_one(module, x, places)
    sides = tuple(module._reversed_padding_repeated_twice[-2::-2])
    axes = tuple(
        (size, start * stride - side, step * stride, count, taps, far)
        for size, (start, step, count), stride, side, taps, far in zip(
            x.shape[2:], places, module.stride, sides, module.kernel_size, module.dilation,
            strict=True,
        )
    )  # fmt: skip
    if not all(_inside(*axis) for axis in axes):
        x = padded(module, x)
        axes = tuple(
            (size, axis[1] + side, *axis[2:])
            for size, axis, side in zip(x.shape[2:], axes, sides, strict=True)
        )
    index = _indices(x.shape[1], axes, x.device)
    count = math.prod(axis[3] for axis in axes)
    return x.flatten(1).index_select(1, index).view(len(x), count, module.groups, -1)


def _picked_of_one(module: Any, x: Tensor, places: Sequence[tuple[int, int, int]]) -> Tensor:
    """The same of one example and one group: a view whose columns lie together.

    All channels have the same places, so few are looked up, and what surrounds the map is one column of zeros.
    """
    index, outside = columns_of(module, x.shape[2:], places, x.device)
    columns = x.reshape(x.shape[1], -1)
    if outside:
        columns = pad(columns, (0, 1))
    rows = columns.index_select(1, index.flatten()).view(-1, index.shape[1]).t()  # (T, I)
    return rows[None, :, None]


def columns_of(
    module: Any, space: torch.Size, places: Sequence[tuple[int, int, int]], device: torch.device
) -> tuple[Tensor, bool]:
    """Places ``(taps, T)`` in a flat map ``space`` of what patches at ``places`` hold; whether some lie outside.

    These are zeros, and have the place after the last.
    """
    settings = module.kernel_size, module.stride, module.dilation
    amounts = tuple(module._reversed_padding_repeated_twice)
    return _columns(space, tuple(places), settings, amounts, module.padding_mode, device)


@functools.lru_cache(256)
def _columns(
    space: torch.Size,
    places: tuple[tuple[int, int, int], ...],
    settings: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    amounts: tuple[int, ...],
    mode: str,
    device: torch.device,
) -> tuple[Tensor, bool]:
    """Found on a map that holds its own places, from one on, as the convolution itself would see it."""
    last = math.prod(space)
    numbers = torch.arange(1, last + 1, dtype=torch.float64).view(1, 1, *space)
    around = pad(numbers, amounts, mode="constant" if mode == "zeros" else mode)
    seen = patches(around, *settings)[0, 0]
    for axis, (start, step, n) in enumerate(places):
        seen = (
            seen.narrow(axis, start, step * (n - 1) + 1).movedim(axis, 0)[::step].movedim(0, axis)
        )
    index = seen.reshape(math.prod(n for _, _, n in places), -1).T.long() - 1
    outside = bool((index < 0).any())
    return index.where(index >= 0, last).contiguous().to(device), outside


def _inside(size: int, first: int, step: int, count: int, taps: int, apart: int) -> bool:
    """Whether no patch reaches beyond the input along one axis."""
    return first >= 0 and first + (count - 1) * step + (taps - 1) * apart < size


@functools.lru_cache(64)
def _indices(
    channels: int, axes: tuple[tuple[int, int, int, int, int, int], ...], device: torch.device
) -> Tensor:
    """Places in an example ``(channels, *space)`` of what patches hold: by position, channel and tap."""
    spatial, stride = len(axes), 1
    total = torch.zeros([1] * (2 * spatial + 1), dtype=torch.long)
    for axis in reversed(range(spatial)):
        size, first, step, count, taps, apart = axes[axis]
        positions, offsets = first + step * torch.arange(count), apart * torch.arange(taps)
        shape = [1] * (2 * spatial + 1)
        shape[axis] = count
        total = total + stride * positions.view(shape)
        shape[axis], shape[spatial + 1 + axis] = 1, taps
        total = total + stride * offsets.view(shape)
        stride *= size
    shape = [1] * (2 * spatial + 1)
    shape[spatial] = channels
    return (total + stride * torch.arange(channels).view(shape)).flatten().to(device)


def sliding_sums(module: Any, x: Tensor, positions: Sequence[int], dtype: torch.dtype) -> Summed:
    """Sums over all patches of the padded ``x``, without writing the patches out.

    Along the first axis of space a patch is ``k`` slices, ``dilation`` apart, and neighbouring patches share slices. So
    the products of pairs of slices are summed over everything else first, once for each distance between the two, and
    each pair of taps then adds up those at its positions: ``k`` products a slice instead of ``k²`` a patch.
    """
    kernel, groups = module.kernel_size, module.groups
    taps, step, stride = kernel[0], module.dilation[0], module.stride[0]
    for axis in range(1, len(kernel)):
        x = x.unfold(axis + 2, module.dilation[axis] * (kernel[axis] - 1) + 1, module.stride[axis])[
            ..., :: module.dilation[axis]
        ]
    spatial = len(kernel)
    n, channels, length = x.shape[:3]
    rest = math.prod(kernel[1:])
    across = channels // groups * rest
    # From overlapping views to the order of the products: one copy.
    view = x.unflatten(1, (groups, -1))
    # (n, G, channels, length, *positions of the other axes, *their taps)
    others, tails = range(4, 3 + spatial), range(3 + spatial, 2 + 2 * spatial)
    view = view.permute(1, 3, 2, *tails, 0, *others)
    slices = torch.empty(view.shape, dtype=dtype, device=x.device).copy_(view)
    slices = slices.reshape(groups, length, across, -1)
    gram = x.new_zeros(groups, taps, across, taps, across, dtype=torch.float64)
    sums = x.new_zeros(groups, taps, across, dtype=torch.float64)
    count = positions[0]
    by_slice = slices.sum(3)
    for first in range(taps):
        start = first * step
        some = by_slice[:, start : start + stride * (count - 1) + 1 : stride]
        sums[:, first] = some.sum(1, dtype=torch.float64)
    products = _pairs(slices, taps, step)
    for apart in range(taps):
        for first in range(taps - apart):
            start = first * step
            some = products[apart][:, start : start + stride * (count - 1) + 1 : stride]
            total = some.sum(1, dtype=torch.float64)
            gram[:, first, :, first + apart] = total
            gram[:, first + apart, :, first] = total.mT
    # Columns of a weight are channels first, then taps of the first axis, then the others.
    order = (groups, taps, channels // groups, rest)
    inputs = channels // groups * taps * rest
    gram = gram.reshape(*order, taps, channels // groups, rest)
    gram = gram.permute(0, 2, 1, 3, 5, 4, 6).reshape(groups, inputs, inputs)
    sums = sums.reshape(order).transpose(1, 2).reshape(groups, inputs)
    return Summed("weight", gram, sums, n * math.prod(positions[:spatial]))


def _pairs(slices: Tensor, taps: int, step: int) -> list[Tensor]:
    """By distance in taps: products ``(G, at least length - distance, I', I')`` of ``slices (G, length, I', n)``."""
    groups, length, across, n = slices.shape
    if step != 1 or length < taps:
        shifts = [apart * step for apart in range(taps)]
        return [slices[:, : length - shift] @ slices[:, shift:].mT for shift in shifts]
    # A slice and those after it lie side by side: one product for all distances.
    whole = length - taps + 1
    size, strides = (groups, whole, taps * across, n), slices.stride()
    after = slices.as_strided(size, (strides[0], strides[1], n, 1))
    out = slices.new_empty(groups, length, across, taps, across)
    out[:, :whole] = (slices[:, :whole] @ after.mT).view(groups, whole, across, taps, across)
    for r in range(whole, length):
        some = slices[:, r] @ slices[:, r:].flatten(1, 2).mT
        out[:, r, :, : length - r] = some.view(groups, across, length - r, across)
    return [out[:, : length - apart, :, apart] for apart in range(taps)]


class ConvSummer(Summer):
    """Sums over patches by the way that is least work: ``spectral.py``, ``shifts.py``, :func:`sliding_sums`.

    With many channels and stride one, products of Fourier coefficients, or of shifted inputs where examples are few;
    with many channels and strides, patches with channels last; with few, slices. A kernel of one tap, or one that never
    overlaps itself, is for :meth:`ConvInputs.inputs`.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.dtype, kernel, groups = dtype, module.kernel_size, module.groups
        channels = module.in_channels // groups
        self.shifts: ShiftedSums | None = None
        self.patches: PatchSums | None = None
        self.spectral: SpectralSums | None = None
        if len(kernel) == 2 and channels >= _MANY_CHANNELS:
            if tuple(module.stride) == (1, 1):
                if groups <= _FEW_GROUPS:
                    self.shifts = ShiftedSums(kernel, module.dilation, groups, dtype)
                    biased = module.bias is not None
                    self.spectral = SpectralSums(_axes(module), groups, dtype, biased=biased)
            elif groups == 1:
                self.patches = PatchSums(kernel, channels, dtype)
        self.slices: Summed | None = None

    def add(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        kernel = module.kernel_size
        spatial = len(kernel)
        sizes = zip(kernel, module.stride, module.dilation, strict=True)
        if all(stride > dilation * (k - 1) for k, stride, dilation in sizes):
            return False
        x = _batched(argument(args, kwargs, 0, "input"), spatial)
        positions = output.shape[-spatial:]
        zeros = module.padding_mode == "zeros"
        space = x.shape[2:] if zeros else _padded_space(module, x)
        if self.spectral is not None and self.spectral.pays(len(x), space):
            self.spectral.add(x if zeros else padded(module, x))
        elif self.shifts is not None and self.shifts.fits(positions):
            self.shifts.add(padded(module, x), positions)
        elif self.patches is not None:
            self.patches.add(padded(module, x), module.stride, module.dilation)
        else:
            return self._slice(module, x, positions)
        return True

    def _slice(self, module: Any, x: Tensor, positions: Sequence[int]) -> bool:
        taps = module.kernel_size[0]
        across = x.shape[1] // module.groups * math.prod(module.kernel_size[1:])
        length = x.shape[2] + taps * module.dilation[0]
        if taps < 2 or 8 * module.groups * length * across**2 > _SLICE_BYTES:
            return False
        each = x.shape[1] * math.prod(module.kernel_size[1:]) * math.prod(positions[1:])
        wide = self.dtype.itemsize // x.element_size() or 1
        for part in _pieces(x, each * wide * (x.shape[2] + taps)):
            found = sliding_sums(module, padded(module, part), positions, self.dtype)
            known = self.slices
            self.slices = found if known is None else _sum(known, found)
        return True

    def flush(self) -> Iterator[Summed]:
        for part in (self.spectral, self.shifts, self.patches):
            if part is not None:
                yield from part.flush()
        if self.slices is not None:
            yield self.slices
        self.slices = None

    def mark(self) -> Tensor | None:
        parts = (self.spectral, self.shifts, self.patches)
        marks = [part.mark() for part in parts if part is not None]
        if self.slices is not None:
            marks.append(self.slices.gram.diagonal(dim1=1, dim2=2).sum())
        some = [mark.double() for mark in marks if mark is not None]
        return torch.stack(some).sum() if some else None


def _axes(module: Any) -> list[Axis]:
    """Of a convolution, with the zeros that it puts around its input; others are put there before."""
    amounts = list(module._reversed_padding_repeated_twice)
    if module.padding_mode != "zeros":
        amounts = [0] * len(amounts)
    before, after = amounts[-2::-2], amounts[-1::-2]
    parts = zip(module.kernel_size, module.dilation, before, after, strict=True)
    return [Axis(*part) for part in parts]


def _padded_space(module: Any, x: Tensor) -> list[int]:
    """Sizes of ``x`` along its axes of space, padded."""
    amounts = list(module._reversed_padding_repeated_twice)
    around = zip(x.shape[2:], amounts[-2::-2], amounts[-1::-2], strict=True)
    return [n + before + after for n, before, after in around]


def _sum(a: Summed, b: Summed) -> Summed:
    return Summed(a.weight, a.gram + b.gram, a.sums + b.sums, a.count + b.count)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvInputs(InputRule):
    """``weight (O, I / groups, *K)``; stride, dilation, groups and every padding mode."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        groups, taps = module.groups, math.prod(module.kernel_size)
        layout = Layout(groups, module.out_channels // groups, module.in_channels // groups * taps)
        return (Read("weight", layout, "bias"),)

    def summer(self, module: Any, dtype: torch.dtype) -> Summer | None:
        return ConvSummer(module, dtype)

    def thinned(
        self,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        at_most: int,
    ) -> Iterator[Seen]:
        positions = output.shape[-len(module.kernel_size) :]
        x = _batched(argument(args, kwargs, 0, "input"), len(positions))
        if not torch.compiler.is_compiling():
            picked = _picked(module, x, places_of(positions, at_most))
            return iter((Seen("weight", picked),))
        places = middles(positions, at_most)
        cuts = [slice(start, None, step) for start, step, _ in places]
        return self._inputs(module, args, kwargs, output, cuts)

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        return self._inputs(module, args, kwargs, output, [])

    def _inputs(
        self,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        cuts: list[slice],
    ) -> Iterator[Seen]:
        spatial = len(module.kernel_size)
        x = _batched(argument(args, kwargs, 0, "input"), spatial)
        positions = output.shape[-spatial:]
        each = x.shape[1] * math.prod(module.kernel_size) * math.prod(positions)
        for number, part in enumerate(_pieces(x, each)):
            seen = patches(padded(module, part), module.kernel_size, module.stride, module.dilation)
            if cuts:
                some = (slice(None), slice(None), *cuts)
                seen = seen[some]
            yield Seen("weight", _inputs(seen, module.groups), follows=number > 0)


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeInputs(InputRule):
    """``weight (I, O / groups, *K)``.

    Output position ``q`` is ``Σ_k W_k x[(q + padding - k · dilation) / stride]`` over taps ``k`` for which that is a
    position of the input. So it is a convolution, by the kernel turned round, of the input with ``stride - 1`` zeros
    between its entries; and the input of the weight is a patch of that. (Asking each input position's own products
    to stand would be more than the outputs need: several of them are added up in one output.)
    """

    def reads(self, module: Any) -> tuple[Read, ...]:
        groups, taps = module.groups, math.prod(module.kernel_size)
        inputs = module.in_channels // groups * taps
        return (
            Read("weight", Layout(groups, module.out_channels // groups, inputs, taps), "bias"),
        )

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        spatial = len(module.kernel_size)
        x = _batched(argument(args, kwargs, 0, "input"), spatial)
        positions = output.shape[-spatial:]
        each = x.shape[1] * math.prod(module.kernel_size) * math.prod(positions)
        for number, part in enumerate(_pieces(x, each)):
            spread = _spread(part, module.stride)
            amount: list[int] = []
            for k, d, p, size, out in zip(
                module.kernel_size,
                module.dilation,
                module.padding,
                spread.shape[2:],
                positions,
                strict=True,
            ):
                before = d * (k - 1) - p  # negative: cut off
                amount = [before, out + d * (k - 1) - size - before, *amount]
            one = [1] * spatial
            seen = patches(pad(spread, amount), module.kernel_size, one, module.dilation)
            seen = seen.flip(*range(-spatial, 0))
            yield Seen("weight", _inputs(seen, module.groups), follows=number > 0)


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """``x (N, Ch, *space)`` with ``stride - 1`` zeros between neighbours."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    out = torch.zeros(*x.shape[:2], *sizes, dtype=x.dtype, device=x.device)
    every = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    out[every] = x
    return out
