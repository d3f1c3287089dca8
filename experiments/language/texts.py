"""Texts by topic and by language that come with the machine, as tokens of the encoder.

Topics are docstrings: of modules of Python's standard library by what they are for, and of packages that the
experiments need anyway. Languages are translated messages of programs: gettext catalogues of the system and of Python
packages. English messages of the same catalogues stand between both: another kind of text in the trained language.
"""

from __future__ import annotations

import gettext
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples import _texts as texts
from experiments.runner import Unavailable
from nullbayes.datasets import Split

LENGTH = 48  # tokens of a text at most, first and last marks included
#: What is trained on: modules of the standard library, or a package after "+".
CLASSES = {
    "internet": texts.FAMILIES["internet"],
    "files": texts.FAMILIES["files"],
    "numbers": texts.FAMILIES["numbers"],
    "development": texts.FAMILIES["development"],
    "plotting": "+matplotlib",
    "statistics": "+statsmodels",
}
TUNING, JUDGING = "tuning", "judging"
#: Sets that are not trained on; which are for choices and which are judged was written down before any figure.
NEAR = {
    "markup": (TUNING, texts.HELD_OUT["markup and codecs"]),
    "concurrency": (JUDGING, texts.FAMILIES["concurrency"]),
    "machine learning": (JUDGING, "+sklearn"),
    "messages": (JUDGING, ""),
}
FAR = {
    "French": (TUNING, "fr"),
    "Polish": (TUNING, "pl"),
    "Turkish": (TUNING, "tr"),
    "German": (JUDGING, "de"),
    "Spanish": (JUDGING, "es"),
    "Russian": (JUDGING, "ru"),
    "Vietnamese": (JUDGING, "vi"),
    "Chinese": (JUDGING, "zh_CN"),
}
OF_A_CLASS, OF_A_SET = 520, 400  # texts at most
SHORTEST = 60  # characters
CATALOGUES = (Path("/usr/share/locale"), Path(sys.prefix) / "share" / "locale")


@dataclass(frozen=True)
class Texts:
    """Tokens ``(N, LENGTH)`` of every class and set, 0 where a text has ended."""

    classes: dict[str, Tensor]
    near: dict[str, Tensor]
    far: dict[str, Tensor]

    def parts(self, seed: int, limit: int | None = None) -> tuple[Split, Split, Split]:
        """60, 15 and 25 % of the texts of every class, others by seed; ``limit`` of a class at most."""
        found: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
        generator = torch.Generator().manual_seed(seed)
        for label, tokens in enumerate(self.classes.values()):
            order = torch.randperm(len(tokens), generator=generator)[:limit]
            ends = int(0.6 * len(order)), int(0.75 * len(order))
            for part, index in zip(found, order.tensor_split(ends), strict=True):
                part.append((tokens[index], torch.full((len(index),), label)))
        out = []
        for name, part in zip(("train", "validation", "test"), found, strict=True):
            ids, labels = (torch.cat(both) for both in zip(*part, strict=True))
            order = torch.randperm(len(ids), generator=generator)
            out.append(Split(ids[order], labels[order], name))
        return out[0], out[1], out[2]

    def sets(self, role: str, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Near and far sets with this role."""
        near = {n: t[:count] for n, t in self.near.items() if NEAR[n][0] == role}
        return near, {n: t[:count] for n, t in self.far.items() if FAR[n][0] == role}


def tokenised(tokenizer: Any) -> Texts:
    """All texts as tokens of a ``tokenizers.Tokenizer``."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)

    def ids(some: list[str]) -> Tensor:
        out = torch.zeros(len(some), LENGTH, dtype=torch.int64)
        for row, found in zip(out, tokenizer.encode_batch(some), strict=True):
            row[: len(found.ids)] = torch.tensor(found.ids)
        return out

    every = {name: ids(found) for name, found in raw().items()}
    return Texts(*({name: every[name] for name in names} for names in (CLASSES, NEAR, FAR)))


def raw() -> dict[str, list[str]]:
    """All texts by class and set, in random order.

    Raises:
        Unavailable: a language has no catalogue here, or a package is not installed.
    """
    topics = {**CLASSES, **{n: where for n, (_, where) in NEAR.items() if where}}
    out = {name: topic(where) for name, where in topics.items()}
    out["messages"] = list(messages(FAR["German"][1], original=True))
    out |= {name: list(messages(code)) for name, (_, code) in FAR.items()}
    for name, found in out.items():
        out[name] = texts.in_order(found, seed=0)[: OF_A_CLASS if name in CLASSES else OF_A_SET]
        if len(found) < 100:
            raise Unavailable(
                f"{len(found)} texts of {name!r} are on this machine, 100 are needed. Languages are read from gettext "
                "catalogues: `apt install git gettext coreutils` or `pip install django` brings some"
            )
    return out


def topic(where: str) -> list[str]:
    """Docstrings of modules of the standard library, or of a package; none comes twice."""
    if not where.startswith("+"):
        return texts.docstrings(where)
    spec = importlib.util.find_spec(where[1:])
    if spec is None or spec.origin is None:
        raise Unavailable(f"{where[1:]} is not installed: `pip install 'nullbayes[experiments]'`")
    paths = sorted(Path(spec.origin).parent.rglob("*.py"))
    kept = [p for p in paths if not {"tests", "test"} & set(p.parts)]
    return list(dict.fromkeys(text for path in kept for text in texts._docstrings(path)))


def messages(language: str, original: bool = False) -> list[str]:
    """Translated messages of all programs here, or what they translate; long ones, none twice."""
    found: dict[str, None] = {}
    for path in catalogues(language):
        try:
            with path.open("rb") as file:
                catalogue = gettext.GNUTranslations(file)
        except (OSError, ValueError, UnicodeDecodeError):
            continue  # not in an encoding that Python knows
        entries = catalogue._catalog  # type: ignore[attr-defined]
        for before, after in entries.items():
            if isinstance(before, str) and before != after:
                text = re.sub(r"\s+", " ", before if original else str(after)).strip()
                if len(text) >= (SHORTEST if text.isascii() or original else SHORTEST // 2):
                    found[text] = None
    return list(found)


def catalogues(language: str) -> Iterator[Path]:
    """gettext's files of a language, of the system and of Python packages."""
    for folder in CATALOGUES:
        yield from sorted((folder / language / "LC_MESSAGES").glob("*.mo"))
    packages = Path(sysconfig.get_paths()["purelib"])
    yield from sorted(packages.glob(f"*/**/locale*/{language}/LC_MESSAGES/*.mo"))
