"""Three tasks that no choice of this library was made on: texts, voices and outlines of leaves, by other networks.

Texts are docstrings of Python's standard library, which is on every machine; voices (nine speakers, twelve cepstral
coefficients at 25 times: *Japanese Vowels*, Kudo, Toyama, Shimbo 1999) and outlines (six species, 427 points: *OSU
Leaf*, Grandhi) come with the package aeon, of which only the files are read.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from examples import _texts as texts
from examples._transformers import vocabulary, words
from experiments.detection.base import Given
from experiments.detection.families import JUDGING, TUNING, Problem, Size
from experiments.detection.training import trained
from experiments.runner import Unavailable
from nullbayes import datasets
from nullbayes.datasets import Split

LENGTH, VOCABULARY, WIDTH = 40, 1000, 48
#: What is held out, and what for; of those to be judged the full setting has both.
TEXTS = {"numbers": TUNING, "internet": JUDGING, "concurrency": JUDGING}
VOICES = {"1 and 2": TUNING, "3 and 4": JUDGING, "7 and 9": JUDGING}
LEAVES = {"1 and 2": TUNING, "3 and 4": JUDGING, "5 and 6": JUDGING}
KINDS = 800  # docstrings of a family, at most
LETTERS = 80_000  # characters of headers and of web pages


class Encoder(nn.Module):
    """One transformer layer over words, and the mean over them; words as numbers ``(B, T)``, 0 for none."""

    positions: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, classes)
        angle = torch.arange(LENGTH)[:, None] / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)
        self.register_buffer("positions", torch.cat([angle.sin(), angle.cos()], 1))

    def forward(self, x: Tensor) -> Tensor:
        there = (x > 0).to(self.positions.dtype)[..., None]
        hidden = self.mix(self.table(x.long()) + self.positions)
        logits: Tensor = self.head((hidden * there).sum(1) / there.sum(1).clamp_min(1))
        return logits


class Voice(nn.Module):
    """An LSTM over time, ``(B, channels, T)``; its last state is what is told apart."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.over_time, self.head = nn.LSTM(channels, 48, batch_first=True), nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.over_time(x.mT)[0][:, -1])
        return logits


def outline_network(classes: int) -> nn.Module:
    """Three convolutions over the outline ``(B, 1, T)``, each with BatchNorm, and the mean over it."""
    layers: list[nn.Module] = []
    for before, width, stride in ((1, 24, 2), (24, 48, 2), (48, 64, 2)):
        layers += [
            nn.Conv1d(before, width, 9, stride, padding=4),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, classes))


# -- problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Docstrings:
    """Training, validation and test texts as numbers, and those of the subject held out."""

    splits: list[Split]
    held_out: Tensor
    classes: int
    encode: Callable[[list[str]], Tensor]


def docstring_splits(seed: int, member: str | None) -> Docstrings:
    """Docstrings of all subjects but ``member``, 60, 15 and 25 %, in words of the first part."""
    found = {n: texts.docstrings(modules)[:KINDS] for n, modules in texts.FAMILIES.items()}
    outside = found.pop(member) if member is not None else []
    kinds = [(text, label) for label, each in enumerate(found.values()) for text in each]
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [kinds[i] for i in order]
    at = int(0.6 * len(chosen)), int(0.75 * len(chosen))
    parts = chosen[: at[0]], chosen[at[0] : at[1]], chosen[at[1] :]
    index = vocabulary((text for text, _ in parts[0]), VOCABULARY)
    numbers = functools.partial(_encoded, index)
    splits = [
        Split(numbers([t for t, _ in part]), torch.tensor([y for _, y in part])) for part in parts
    ]
    return Docstrings(splits, numbers(outside), len(found), numbers)


def docstrings(member: str, seed: int, size: Size) -> Problem:
    """What a docstring is about, one subject held out; far: C++ headers, web pages, words in any order."""
    made = docstring_splits(seed, member)
    test = made.splits[2].inputs
    far = {
        "C++ headers": made.encode(_pieces(texts.headers(LETTERS))),
        "web pages": made.encode(_pieces(texts.web_pages(LETTERS))),
        "any words": torch.where(
            test > 0, torch.randint(2, VOCABULARY, test.shape, generator=_by(seed)), 0
        ).float(),
    }
    build = functools.partial(_plain, Encoder, made.classes)
    outside = ({member: made.held_out}, far)
    return _problem("texts", member, build, made.splits, seed, size, outside)


def voices(member: str, seed: int, size: Size) -> Problem:
    """Who speaks, two speakers held out; far: backwards, times in any order, noise as loud as the voices."""
    splits, held = _series("JapaneseVowels/JapaneseVowels_eq", member, seed)
    classes, channels = int(splits[0].targets.max()) + 1, splits[0].inputs.shape[1]
    build = functools.partial(_plain, Voice, channels, classes)
    far = {"backwards": splits[2].inputs.flip(2)} | _spoiled(splits[2].inputs, seed)
    return _problem("voices", member, build, splits, seed, size, ({"other speakers": held}, far))


def leaves(member: str, seed: int, size: Size) -> Problem:
    """Which species, two held out; far: points in any order, noise. (Backwards it is another leaf.)"""
    splits, held = _series("OSULeaf/OSULeaf", member, seed)
    build = functools.partial(_plain, outline_network, int(splits[0].targets.max()) + 1)
    far = _spoiled(splits[2].inputs, seed)
    return _problem("leaves", member, build, splits, seed, size, ({"other species": held}, far))


def _problem(
    name: str,
    member: str,
    build: Callable[..., nn.Module],
    splits: list[Split],
    seed: int,
    size: Size,
    outside: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> Problem:
    train, validation, test = splits
    make = functools.partial(trained, (name, member), build, train, size.recipe)
    given = Given(make(seed), train, validation.inputs, size.preserved, "classification", seed)
    near, far = ({k: v[: size.sets] for k, v in sets.items()} for sets in outside)
    return Problem(given, test[: size.test], near, far, make, validation)


def _plain(make: Callable[..., nn.Module], *args: int) -> nn.Module:
    """Without the rate of dropout that comes last."""
    return make(*args[:-1])


def _by(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- texts ---------------------------------------------------------------------------------------


def _encoded(index: dict[str, int], some: list[str]) -> Tensor:
    """Words as numbers ``(N, T)``, in the dtype of inputs: whole numbers below 2²⁴ are exact."""
    out = torch.zeros(len(some), LENGTH)
    for n, text in enumerate(some):
        tokens = [index.get(word, 1) for word in words(text)[:LENGTH]]
        out[n, : len(tokens)] = torch.tensor(tokens, dtype=out.dtype)
    return out


def _pieces(text: str) -> list[str]:
    found = re.findall(r"\S+", text)
    return [" ".join(found[i : i + LENGTH]) for i in range(0, len(found) - LENGTH, LENGTH)]


# -- series --------------------------------------------------------------------------------------


def _series(name: str, member: str, seed: int) -> tuple[list[Split], Tensor]:
    """60, 15 and 25 % of both files together, standardised by the first, and what is held out."""
    parts = [_read(_folder() / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")]
    x, y = (torch.cat(both) for both in zip(*parts, strict=True))
    pair = tuple(int(c) - 1 for c in member.split(" and "))
    kept, held = datasets.hold_out_classes(Split(x, y), pair)
    counts = (int(0.6 * len(kept)), int(0.15 * len(kept)), None)
    found = datasets.partition(kept, counts, seed=seed, names=("train", "validation", "test"))
    mean, deviation = (
        getattr(found[0].inputs, what)((0, 2), keepdim=True) for what in ("mean", "std")
    )
    splits = [Split((p.inputs - mean) / deviation, p.targets, p.name) for p in found]
    order = torch.randperm(len(held), generator=_by(seed))
    return splits, ((held.inputs - mean) / deviation)[order]


def _folder() -> Path:
    spec = importlib.util.find_spec("aeon")
    if spec is None or spec.origin is None:
        raise Unavailable(
            "aeon, whose data are read, is not installed: `pip install --no-deps aeon`"
        )
    return Path(spec.origin).parent / "datasets" / "data"


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Series of one length ``(N, channels, T)`` and classes from 0: channels by ``:``, the class last."""
    lines = path.read_text().split("@data")[1].strip().splitlines()
    rows = [line.strip().split(":") for line in lines]
    x = torch.tensor([[[float(v) for v in channel.split(",")] for channel in r[:-1]] for r in rows])
    return x, torch.tensor([int(float(r[-1])) - 1 for r in rows])


def _spoiled(x: Tensor, seed: int) -> dict[str, Tensor]:
    order = torch.rand(len(x), 1, x.shape[2], generator=_by(seed)).argsort(2)
    return {
        "any order": x.gather(2, order.expand_as(x)),
        "noise": torch.randn(x.shape, generator=_by(seed)),
    }
