"""Modules that people write and libraries stumble over: functions of one example alone, but for the hostile ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Step(nn.Module):
    """A module that gets the extra inputs too: ``mask`` and ``positions``, None where the data have none."""


class Function(nn.Module):
    """A function of the activations, with a name to print."""

    def __init__(self, name: str, function: Any) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Product(nn.Module):
    """Two branches of the same input, multiplied."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * torch.sigmoid(self.right(x))


class Twice(nn.Module):
    """One module used twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Tied(nn.Module):
    """Two layers with one weight; ``transposed``: the second use is a function the module tree does not show."""

    def __init__(self, width: int, transposed: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.two.weight = self.one.weight
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        if self.transposed:
            h = torch.tanh(F.linear(h, self.one.weight.T))
        return self.two(h)


class Elementwise(nn.Module):
    """Parameters of no layer; ``sliced``: used a slice at a time."""

    def __init__(self, width: int, sliced: bool) -> None:
        super().__init__()
        self.scale, self.shift = (
            nn.Parameter(torch.rand(width) + 0.5),
            nn.Parameter(torch.zeros(width)),
        )
        self.sliced = sliced

    def forward(self, x: Tensor) -> Tensor:
        if self.sliced:
            half = x.shape[-1] // 2
            left = x[..., :half] * self.scale[:half]
            return torch.cat([left, torch.sin(x[..., half:] * self.scale[half:])], -1) + self.shift
        return x * self.scale + self.shift


class BehindView(nn.Module):
    """A layer's output overwritten in place, through a view of it."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.how == "relu_":
            return F.relu_(h.view(-1, h.shape[-1])).view(h.shape)
        if self.how == "slice":
            h[..., :1].mul_(0.5).tanh_()
            return h
        if self.how == "transpose":
            h.transpose(0, 1).mul_(2.0)
            return h
        return h.add_(x.mean(-1, keepdim=True))

    def extra_repr(self) -> str:
        return self.how


class SequenceFirst(nn.Module):
    """The inner module sees ``(T, B, D)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Windows(nn.Module):
    """Tokens folded into the batch in windows of two (one, where their number is odd)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        size = 2 if t % 2 == 0 else 1
        h = self.inner(x.reshape(b * t // size, size, d))
        return h.reshape(b, t, h.shape[-1])


class Flattened(nn.Module):
    """Tokens and batch in one axis."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.reshape(-1, x.shape[-1]))
        return h.reshape(*x.shape[:-1], h.shape[-1])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.core = kind(width, hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.core.batch_first:
            return self.core(x)[0]
        return self.core(x.transpose(0, 1))[0].transpose(0, 1)


class Sorted(nn.Module):
    """Sorts its batch, works, and puts it back (as packing by length does)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        order = x.detach().flatten(1).sum(1).argsort()
        return self.inner(x[order])[order.argsort()]


class Experts(nn.Module):
    """Each example goes to one of the experts, by indexing (``index``) or under a mask (``where``)."""

    def __init__(self, experts: list[nn.Module], how: str, edge: float) -> None:
        super().__init__()
        self.experts, self.how, self.edge = nn.ModuleList(experts), how, edge

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x.detach().flatten(1).sum(1) > self.edge).long()
        if self.how == "where":
            shape = (-1, *[1] * (x.ndim - 1))
            return torch.where(chosen.view(shape).bool(), self.experts[1](x), self.experts[0](x))
        out = torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if bool(mine.any()):
                out[mine] = expert(x[mine])
        return out

    def extra_repr(self) -> str:
        return f"{self.how}, edge={self.edge}"


class EarlyExit(nn.Module):
    """Examples that are sure already skip the inner module; all of them: it does not run at all."""

    def __init__(self, inner: nn.Module, edge: float) -> None:
        super().__init__()
        self.inner, self.edge = inner, edge

    def forward(self, x: Tensor) -> Tensor:
        done = x.detach().flatten(1).abs().amax(1) > self.edge
        if bool(done.all()):
            return x
        h = x.clone()
        h[~done] = self.inner(x[~done])
        return h

    def extra_repr(self) -> str:
        return f"edge={self.edge}"


class MaskedTokens(Step):
    """A layer on the tokens that count, all examples' in one list."""

    def __init__(self, inner: nn.Module, shared: bool) -> None:
        super().__init__()
        self.inner, self.shared = inner, shared

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        if mask is None or self.shared:
            return self.inner(x)
        out = torch.zeros_like(x)
        out[mask] = self.inner(x[mask])
        return out


class Attention(Step):
    """``nn.MultiheadAttention`` with a key-padding mask (B, T) or a shared mask (T, T)."""

    def __init__(self, width: int, heads: int, weights: bool, first: bool, shared: bool) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(width, heads, batch_first=first)
        self.weights, self.shared = weights, shared

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        h = x if self.core.batch_first else x.transpose(0, 1)
        options: dict[str, Any] = {"need_weights": self.weights}
        if mask is not None:
            options["attn_mask" if self.shared else "key_padding_mask"] = ~mask
        out = self.core(h, h, h, **options)[0]
        return x + (out if self.core.batch_first else out.transpose(0, 1))


class OwnAttention(Step):
    """Scaled dot-product attention by hand; ``fused``: torch's function."""

    def __init__(self, width: int, fused: bool, shared: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fused, self.shared = fused, shared

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if mask is not None:
            mask = mask if self.shared else mask[:, None, :]
        if self.fused:
            return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return x + self.out(scores.softmax(-1) @ v)


class EncoderLayer(Step):
    def __init__(self, width: int, norm_first: bool, shared: bool) -> None:
        super().__init__()
        self.core = nn.TransformerEncoderLayer(
            width, 1, 2 * width, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.shared = shared

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        if mask is None:
            return self.core(x)
        if self.shared:
            return self.core(x, src_mask=~mask)
        return self.core(x, src_key_padding_mask=~mask)


class Positions(Step):
    """Position table: a parameter, a lookup of ``arange``, or a lookup of position ids from the data."""

    def __init__(self, width: int, how: str, longest: int) -> None:
        super().__init__()
        self.how = how
        if how == "parameter":
            self.table = nn.Parameter(torch.randn(1, longest, width))
        else:
            self.lookup = nn.Embedding(longest, width)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        if self.how == "parameter":
            return x + self.table[:, : x.shape[1]]
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        return x + self.lookup(positions)

    def extra_repr(self) -> str:
        return self.how


class ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)


class MaskedMean(Step):
    """Mean of the tokens that count."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        if mask is None or self.shared:
            return x.mean(1)
        weight = mask.unsqueeze(-1).to(x)
        return (x * weight).sum(1) / weight.sum(1).clamp_min(1)


class BatchMean(nn.Module):
    """Hostile: mixes the examples of a batch. Only a refusal is right."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


class RareNoise(nn.Module):
    """Hostile: draws random numbers. Only a refusal is right."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


class Counting(nn.Module):
    """Hostile: another function at each call. Only a refusal is right."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * torch.sin(self.calls))


class Network(nn.Module):
    """A chain of steps and one or two heads; ``squeeze``: what is done to the output's last axis."""

    def __init__(self, steps: list[nn.Module], heads: list[nn.Module], how: str) -> None:
        super().__init__()
        self.steps, self.heads, self.how = nn.ModuleList(steps), nn.ModuleList(heads), how

    def forward(self, x: Tensor, mask: Any = None, positions: Any = None) -> Any:
        for step in self.steps:
            x = step(x, mask, positions) if isinstance(step, Step) else step(x)
        if self.how == "dict":
            return {"first": self.heads[0](x), "second": self.heads[1](x)}
        out = self.heads[0](x)
        if self.how == "squeeze(-1)":
            return out.squeeze(-1)
        return out.squeeze() if self.how == "squeeze()" else out
