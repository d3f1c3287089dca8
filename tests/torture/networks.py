"""Random networks: an integer seed, a list of choices or hypothesis decides everything about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.torture import layers as own
from tests.torture.choices import Choices

#: a step and the shape after it
Drawn = tuple[nn.Module, "Shape"]
LONGEST = 6


@dataclass(frozen=True)
class Shape:
    """What flows: ``kind`` names the axes of ``size``, without the batch.

    vector (D,), tokens (T, D), signal (C, L), image (C, H, W), volume (C, D, H, W), ids (T,).
    """

    kind: str
    size: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.size[-1] if self.kind in ("vector", "tokens") else self.size[0]

    def wide(self, width: int) -> Shape:
        """The same with another number of features."""
        if self.kind in ("vector", "tokens"):
            return Shape(self.kind, (*self.size[:-1], width))
        return Shape(self.kind, (width, *self.size[1:]))


@dataclass
class Drawing:
    """A network as drawn, and what its data have to look like.

    Attributes:
        shared: the mask is one (T, T) for all examples instead of (B, T).
        varying: batches may have other numbers of tokens.
        hostile: no per-example answer exists; only a refusal is right.
    """

    start: Shape
    vocabulary: int = 0
    mask: bool = False
    shared: bool = False
    positions: str = ""  # "", "shared" (1, T) or "each" (B, T)
    varying: bool = False
    hostile: str = ""
    out: Shape = Shape("vector", (1,))
    model: nn.Module = field(default_factory=nn.Identity)


INPUTS = (
    *[Shape("vector", (n,)) for n in (3, 2, 4)],
    *[Shape("tokens", s) for s in ((3, 2), (2, 3), (4, 4), (3, 4))],
    *[Shape("image", s) for s in ((1, 4, 4), (2, 3, 4))],
    Shape("signal", (2, 5)),
    Shape("ids", (4,)),
    Shape("ids", (3,)),
    Shape("volume", (1, 3, 2, 3)),
)


def draw(c: Choices) -> Drawing:
    """A network without weights' values: those come from the torch seed of whoever calls."""
    d = Drawing(c.pick(INPUTS))
    shape, steps = d.start, []
    if shape.kind == "ids":
        d.vocabulary = 7
        width = c.pick([3, 2, 4])
        padding = c.pick([None, 0])
        c.say(f"Embedding(7, {width}, padding_idx={padding})")
        steps.append(nn.Embedding(7, width, padding_idx=padding))
        shape = Shape("tokens", (*shape.size, width))
    if shape.kind == "tokens":
        _extras(c, d)
    for _ in range(c.pick([1, 2, 0, 3])):
        step, shape = _step(c, d, shape)
        steps.append(step)
    if c.rarely(25):
        d.hostile = c.pick(["batch mean", "rare noise", "noise", "counter"])
        made = {"batch mean": own.BatchMean, "counter": own.Counting}
        noise = 0.001 if d.hostile == "rare noise" else 0.5
        steps.append(made[d.hostile]() if d.hostile in made else own.RareNoise(noise))
        c.say(f"HOSTILE {d.hostile}")
    dense = shape.kind == "tokens" and not d.varying and c.rarely(6)
    if not dense:
        step, shape = _reduced(c, d, shape)
        steps.append(step)
    d.out = shape
    d.model = nn.ModuleList(steps)
    return d


def _extras(c: Choices, d: Drawing) -> None:
    """A mask, position ids, batches of other lengths."""
    d.varying = c.rarely(6)
    kind = c.pick(["", "", "", "each", "shared"])
    d.mask, d.shared = bool(kind), kind == "shared"
    d.positions = c.pick(["", "", "", "", "shared", "each"])


def _step(c: Choices, d: Drawing, shape: Shape) -> Drawn:
    """One step of the body: a layer with its nonlinearity, or something around one."""
    if shape.kind == "vector":
        return _any(c, shape, _vector(c, shape))
    if shape.kind == "tokens":
        kind = c.pick(["layer", "attention", "recurrent", "positions", "mask"])
        if kind == "attention":
            return _attention(c, d, shape)
        if kind == "recurrent":
            return _recurrent(c, shape)
        if kind == "positions":
            how = c.pick(["lookup", "parameter"])
            c.say(f"Positions({how})")
            return own.Positions(shape.width, how, LONGEST + 1), shape
        if kind == "mask":
            c.say("MaskedTokens(Linear)")
            return own.MaskedTokens(nn.Linear(shape.width, shape.width), d.shared), shape
        return _tokens(c, d, shape)
    return _grid(c, shape)


def _activation(c: Choices) -> list[nn.Module]:
    made = c.pick(
        [nn.Tanh, nn.GELU, nn.ReLU, None, nn.SiLU, nn.Softplus, nn.ELU, "inplace", "prelu"]
    )
    if made is None:
        return []
    c.say(made if isinstance(made, str) else made.__name__)
    if isinstance(made, str):
        return [nn.ReLU(inplace=True) if made == "inplace" else nn.PReLU()]
    return [made()]


def _linear(c: Choices, width: int, out: int) -> nn.Module:
    """``nn.Linear``, now and then without bias or with a parametrised weight."""
    how = c.pick(["plain", "plain", "no bias", "weight_norm", "spectral_norm", "orthogonal"])
    c.say(f"Linear({width}, {out}, {how})")
    layer = nn.Linear(width, out, bias=how != "no bias")
    wrap = getattr(parametrizations, how, None)
    return layer if wrap is None else wrap(layer)


def _vector(c: Choices, shape: Shape) -> nn.Module:
    out = c.pick([shape.width, 3, 2, 4])
    layers: list[nn.Module] = [_linear(c, shape.width, out)]
    norm = c.pick(["", "", "BatchNorm1d", "LayerNorm", "RMSNorm"])
    if norm:
        c.say(norm)
        layers.append(getattr(nn, norm)(out))
    return nn.Sequential(*layers, *_activation(c))


def _width(inner: nn.Module, shape: Shape) -> int:
    """Features after ``inner``, by trying: drawn modules know only how to run."""
    inner.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return int(inner(torch.zeros(2, *shape.size)).shape[-1])


WRAPPERS = (
    *("none", "none", "none", "residual", "product", "twice", "tied", "transposed", "elementwise"),
    *("sliced", "view", "sorted", "experts", "where", "exit", "sequence first", "windows"),
    *("flattened", "bilinear"),
)


def _any(c: Choices, shape: Shape, inner: nn.Module) -> Drawn:
    """``inner`` as it is, or with something around it that keeps or knows the width."""
    how = c.pick((*WRAPPERS[:-4], "bilinear") if shape.kind == "vector" else WRAPPERS[:-1])
    out, d = _width(inner, shape), shape.width
    if how in ("residual", "twice", "experts", "where", "exit") and out != d:
        inner = nn.Sequential(inner, nn.Linear(out, d))
        out = d
    wrap: dict[str, Callable[[], nn.Module]] = {
        "none": lambda: inner,
        "residual": lambda: own.Residual(inner),
        "product": lambda: own.Product(inner, nn.Linear(d, out)),
        "twice": lambda: own.Twice(inner),
        "tied": lambda: nn.Sequential(inner, own.Tied(out, False)),
        "transposed": lambda: nn.Sequential(inner, own.Tied(out, True)),
        "elementwise": lambda: nn.Sequential(inner, own.Elementwise(out, False)),
        "sliced": lambda: nn.Sequential(inner, own.Elementwise(out, True)),
        "view": lambda: own.BehindView(
            nn.Linear(d, out), c.pick(["relu_", "slice", "transpose", "add_"])
        ),
        "sorted": lambda: own.Sorted(inner),
        "experts": lambda: own.Experts([inner, nn.Linear(d, d)], "index", c.pick([0.0, 2.0])),
        "where": lambda: own.Experts([inner, nn.Linear(d, d)], "where", c.pick([0.0, 2.0])),
        "exit": lambda: own.EarlyExit(inner, c.pick([1.0, 0.2, 3.0])),
        "sequence first": lambda: own.SequenceFirst(inner),
        "windows": lambda: own.Windows(inner),
        "flattened": lambda: own.Flattened(inner),
        "bilinear": lambda: nn.Sequential(inner, _Both(out)),
    }
    if how != "none":
        c.say(f"({how} around it)")
    return wrap[how](), shape.wide(out + 2 if how == "bilinear" else out)


class _Both(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.core = nn.Bilinear(width, width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.core(x, torch.tanh(x))], -1)


def _tokens(c: Choices, d: Drawing, shape: Shape) -> Drawn:
    if not (d.varying or d.mask or d.positions) and c.rarely(8):
        c.say("ClassToken")
        return own.ClassToken(shape.width), Shape("tokens", (shape.size[0] + 1, shape.width))
    out = c.pick([shape.width, 3, 2, 4])
    layers = [_linear(c, shape.width, out)]
    norm = c.pick(["", "", "LayerNorm", "RMSNorm", "Conv1d"])
    if norm == "Conv1d":
        c.say("Conv1d over tokens")
        turn = own.Function("transpose", lambda h: h.transpose(1, 2))
        layers += [turn, nn.Conv1d(out, out, 3, padding=1), turn]
    elif norm:
        c.say(norm)
        layers.append(getattr(nn, norm)(out))
    inner = nn.Sequential(*layers, *_activation(c))
    if norm == "Conv1d":
        return inner, shape.wide(out)
    return _any(c, shape, inner)


def _attention(c: Choices, d: Drawing, shape: Shape) -> Drawn:
    how = c.pick(["own", "own fused", "packed", "packed weights", "packed first", "encoder", "pre"])
    width = shape.width
    c.say(f"attention({how}, shared={d.shared})")
    if how.startswith("own"):
        return own.OwnAttention(width, how.endswith("fused"), d.shared), shape
    if how.startswith("packed"):
        heads = 2 if width % 2 == 0 else 1
        first, weights = not how.endswith("first"), how.endswith("weights")
        return own.Attention(width, heads, weights, first, d.shared), shape
    return own.EncoderLayer(width, how == "pre", d.shared), shape


def _recurrent(c: Choices, shape: Shape) -> Drawn:
    kind = c.pick([nn.GRU, nn.LSTM, nn.RNN])
    first, both, layers = c.pick([True, False]), c.rarely(3), c.pick([1, 1, 2])
    c.say(f"{kind.__name__}(batch_first={first}, bidirectional={both}, layers={layers})")
    step = own.Recurrent(
        kind, shape.width, 2, batch_first=first, bidirectional=both, num_layers=layers
    )
    return step, shape.wide(4 if both else 2)


def _grid(c: Choices, shape: Shape) -> Drawn:
    """A convolution, now and then transposed, grouped or padded in another way, and a norm."""
    n = len(shape.size) - 1
    ins, out = shape.width, c.pick([2, 3, 4])
    options: dict[str, object] = {"padding": 1}
    how = c.pick(
        ["plain", "transposed", "groups", "stride", "circular", "reflect", "no bias", "even"]
    )
    if min(shape.size[1:]) < 2 and how in ("reflect", "circular", "stride"):
        how = "plain"
    if how == "groups":
        out, options["groups"] = 2 * ins, ins
    elif how == "stride":
        options["stride"] = 2
    elif how in ("circular", "reflect"):
        options["padding_mode"] = how
    elif how == "no bias":
        options["bias"] = False
    kernel = 2 if how == "even" else 3
    name = f"Conv{'Transpose' if how == 'transposed' else ''}{n}d"
    c.say(f"{name}({ins}, {out}, {kernel}, {how})")
    layers: list[nn.Module] = [getattr(nn, name)(ins, out, kernel, **options)]
    norm = c.pick(["", "", f"BatchNorm{n}d", "GroupNorm", f"InstanceNorm{n}d", "weight_norm"])
    if max(shape.size[1:]) < 4 and norm.startswith("Instance"):
        norm = ""  # a channel may be left with one element
    if norm == "weight_norm":
        layers[0] = parametrizations.weight_norm(layers[0])
    elif norm == "GroupNorm":
        layers.append(nn.GroupNorm(1, out))
    elif norm.startswith("Instance"):
        layers.append(getattr(nn, norm)(out, affine=True))
    elif norm:
        layers.append(getattr(nn, norm)(out))
    if norm:
        c.say(norm)
    inner = nn.Sequential(*layers, *_activation(c)).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        size = tuple(inner(torch.randn(2, *shape.size)).shape[1:])
    return inner, Shape(shape.kind, size)


def _reduced(c: Choices, d: Drawing, shape: Shape) -> Drawn:
    """To one vector an example."""
    if shape.kind == "vector":
        return nn.Identity(), shape
    if shape.kind != "tokens":
        how = c.pick(["flatten", "mean", "max"])
        if how == "flatten":
            size = torch.Size(shape.size).numel()
            return nn.Flatten(), Shape("vector", (size,))
        axes = tuple(range(2, len(shape.size) + 1))
        done = {"mean": lambda h: h.mean(axes), "max": lambda h: h.amax(axes)}
        return own.Function(how, done[how]), Shape("vector", (shape.width,))
    how = c.pick(["mean", "last", "flatten", "max", "masked mean"])
    c.say(f"tokens: {how}")
    vector = Shape("vector", (shape.width,))
    if how == "flatten" and not d.varying:
        return nn.Flatten(), Shape("vector", (shape.size[0] * shape.width,))
    if how in ("last", "max"):
        made = {"last": lambda h: h[:, -1], "max": lambda h: h.amax(1)}
        return own.Function(how, made[how]), vector
    return own.MaskedMean(d.shared), vector
