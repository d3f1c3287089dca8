"""Text that is on every machine with Python and torch: docstrings of the standard library by what they are about,
C++ headers, web pages, and docstrings made unreadable."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from nullbayes.errors import InputError

T = TypeVar("T")
FAMILIES = {
    "internet": "email http urllib xmlrpc wsgiref imaplib poplib smtplib ftplib nntplib telnetlib socketserver ssl "
    "socket cgi ipaddress webbrowser mailbox",
    "concurrency": "asyncio concurrent threading multiprocessing subprocess queue selectors contextvars",
    "files": "tarfile zipfile pathlib shutil tempfile os ntpath posixpath gzip bz2 lzma _pyio glob fnmatch filecmp",
    "numbers": "_pydecimal decimal fractions statistics random datetime _pydatetime calendar numbers _strptime",
    "development": "unittest inspect pydoc doctest pdb bdb ast symtable traceback dis trace pickletools logging",
}
HELD_OUT = {
    "markup and codecs": "xml html encodings codecs json locale difflib plistlib gettext",
    "windows and turtles": "tkinter turtle turtledemo idlelib",  # not in every installation
}
SHORTEST = 60  # characters of a docstring that counts


def docstrings(modules: str) -> list[str]:
    """Docstrings of modules, classes and functions below the named ones; nothing is imported, none comes twice."""
    found = (text for name in modules.split() for text in _below(name))
    return list(dict.fromkeys(found))


@functools.cache
def _below(name: str) -> tuple[str, ...]:
    library = Path(sysconfig.get_paths()["stdlib"])
    every = (library / f"{name}.py", *sorted((library / name).rglob("*.py")))
    paths = [p for p in every if p.is_file() and not {"test", "tests", "idle_test"} & set(p.parts)]
    return tuple(text for path in paths for text in _docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text and len(text) >= SHORTEST:
            yield text


def headers(least: int) -> str:
    """``least`` characters or more of torch's C++ headers, which come with every installation of torch."""
    origin = importlib.util.find_spec("torch")
    assert origin is not None and origin.origin is not None
    return _joined((Path(origin.origin).parent / "include" / "ATen" / "core").glob("*.h"), least)


def web_pages(least: int) -> str:
    """``least`` characters or more of HTML, CSS and JavaScript that come with the packages of ``nullbayes[demo]``."""
    paths: list[Path] = []
    for package in ("sklearn", "matplotlib", "nullbayes"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent
            for kind in ("html", "css", "js"):
                paths += sorted(folder.rglob(f"*.{kind}"))
    return _joined(paths, least)


def _joined(paths: Iterable[Path], least: int) -> str:
    text = ""
    for path in sorted(paths):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= least:
            return text
    raise InputError(f"found {len(text)} characters of text, {least} are needed: ask for fewer.")


def in_order(found: Sequence[T], seed: int) -> list[T]:
    """A list in random order."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order.tolist()]


def split(found: Sequence[T], train: int, validation: int, test: int) -> dict[str, list[T]]:
    """Training, validation and test part of a list, in random order."""
    need = train + validation + test
    if len(found) < need:
        raise InputError(
            f"{need} docstrings are needed, this Python has {len(found)}: ask for fewer."
        )
    found = in_order(found, seed=0)
    return {
        "train": found[:train],
        "validation": found[train : train + validation],
        "test": found[train + validation : need],
    }


def cut(text: str, lengths: Sequence[int], seed: int) -> list[str]:
    """Pieces of ``text`` of these lengths, from random places."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for length in lengths:
        start = int(torch.randint(len(text) - length, (1,), generator=generator))
        pieces.append(text[start : start + length])
    return pieces


def shuffled(texts: Sequence[str], seed: int, words: bool = False) -> list[str]:
    """The same letters, or words, of each text in random order."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for text in texts:
        parts = text.split(" ") if words else list(text)
        order = torch.randperm(len(parts), generator=generator).tolist()
        out.append((" " if words else "").join(parts[i] for i in order))
    return out


def repeated(texts: Sequence[str], period: int = 5) -> list[str]:
    """The first letters of each text over and over, as long as the text was."""
    return [(text[:period] * len(text))[: len(text)] for text in texts]
