"""Damaged files: bits flipped, ends cut off, entries edited. Each is refused with a `StorageError`, or read as it was.

Edits come in two kinds. Raw ones leave the file's checksum as it was: the file has to be refused, or equal. Signed ones
put a right checksum on a wrong description: the reader may take it (it cannot know), but nothing else than a
`StorageError` may come out, neither then nor when the posterior is used.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import random
import struct
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nullbayes as nb
from nullbayes import datasets
from nullbayes.common.writing import write_signed_json
from nullbayes.posterior.posterior_file import signed
from nullbayes.report import read_results
from nullbayes.solvers.checkpoint import Watch

REFUSED, EQUAL, TAKEN = "refused", "equal", "taken"
WRONG, RAW = "accepted, but other", "raw error"
# What a JSON edit may put in the place of anything.
STRANGE = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**64, -(2**63), 10**400, 0.5, -1.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "evidence", "auto", "torch.float16", "\0", "é" * 40),
    *([], [[]], [1], ["x"], [[[[0]]]], {}, {"name": "x"}, {"0.weight": 1.0}, {"x": None}),
)


@dataclass
class Target:
    """A kind of file.

    Attributes:
        whole: its bytes. ``read``: path -> what it says; ``same``: whether that is what was written.
        edit: random generator -> bytes with an edited entry, and whether the checksum was put right.
    """

    name: str
    whole: bytes
    read: Callable[[Path], Any]
    same: Callable[[Any], bool]
    edit: Callable[[random.Random], tuple[bytes, bool]] | None = None


def outcome(target: Target, folder: Path, seed: int) -> tuple[str, str, str]:
    """Damage the file as ``seed`` says and read it: what was done, what came of it, and the error if there is one."""
    rng = random.Random(f"{target.name} {seed}")
    how, data, signed = _damaged(target, rng)
    path = folder / "file"
    path.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target.read(path)
    except nb.StorageError:
        return how, REFUSED, ""
    except Exception as error:
        if signed and isinstance(error, nb.NullBayesError):
            return how, REFUSED, ""  # a setting that can be, but not for this model
        return how, RAW, f"{type(error).__module__}.{type(error).__name__}: {error}"[:300]
    if target.same(found):
        return how, EQUAL, ""
    return how, (TAKEN if signed else WRONG), ""


def _damaged(target: Target, rng: random.Random) -> tuple[str, bytes, bool]:
    whole = target.whole
    kinds = ["flip", "flip", "flips", "cut", "drop", "insert", "zeros", "swap"]
    kind = rng.choice(kinds + ["edit"] * 4 * (target.edit is not None))
    data = bytearray(whole)
    # Half of the damage goes into the head, where a change means something else than other numbers.
    at = rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))
    if kind == "edit":
        assert target.edit is not None
        edited, signed = target.edit(rng)
        return ("signed edit" if signed else "edit"), edited, signed
    if kind in ("flip", "flips"):
        for place in [at] + [rng.randrange(len(data)) for _ in range(20 * (kind == "flips"))]:
            data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "drop":
        del data[at : at + rng.randrange(1, 64)]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif kind == "zeros":
        end = min(at + rng.randrange(1, 512), len(data))
        data[at:end] = bytes(end - at)
    else:
        other = rng.randrange(len(data))
        data[at : at + 16], data[other : other + 16] = data[other : other + 16], data[at : at + 16]
    return kind, bytes(data), False


def strange(value: Any, rng: random.Random) -> Any:
    """``value`` with one entry, anywhere in it, replaced, removed, doubled or nested deeply."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(item: Any) -> None:
        keys = (
            item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        )
        for key in keys:
            places.append((item, key))
            walk(item[key])

    walk(value)
    where, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del where[key]
    elif how < 0.25 and isinstance(where, dict):
        where[f"{key}x"] = where.pop(key)
    elif how < 0.3:
        deep: Any = 0
        for _ in range(rng.choice([30, 900])):
            deep = [deep]
        where[key] = deep
    else:
        where[key] = rng.choice(STRANGE)
    return value


# -- the kinds of files ------------------------------------------------------------------------------


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()


def _data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, generator=generator)
    return [(x[:5], torch.arange(5) % 3), (x[5:], torch.arange(3))]


def _fitted(calibrated: bool) -> Any:
    prior: Any = "evidence" if calibrated else {n: 1.5 for n, _ in _network().named_parameters()}
    options: dict[str, Any] = {
        "prior_precision": prior,
        "directions": "auto" if calibrated else None,
    }
    likelihood = nb.Classification(weight=[1.0, 0.5, 2.0])
    posterior = nb.NullSpacePosterior(_network(), likelihood, **options)
    posterior.fit(_data(), 3, progress=False)
    if calibrated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior.calibrate(_data(), progress=False)
    return posterior


def _posterior_file(folder: Path, calibrated: bool) -> Target:
    path = folder / f"posterior-{calibrated}.safetensors"
    fitted = _fitted(calibrated)
    fitted.save(path)
    x, model = _data()[0][0], _network()

    def read(path: Path) -> Any:
        posterior = nb.load(path, model)
        # What it says has to be usable, too.
        answer = posterior.predict(x)
        said = (
            str(posterior.certificate),
            posterior.certificate.held,
            posterior.certificate.as_dict(),
        )
        return answer.outputs, answer.mean, said, posterior.calibration, posterior.num_samples

    wanted = read(path)
    tensors = load_file(path)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + size])["__metadata__"]
    scratch = folder / "edited"

    def edit(rng: random.Random) -> tuple[bytes, bool]:
        text, right = json.dumps(strange(json.loads(head["nullbayes"]), rng)), rng.random() < 0.5
        said = signed(text, tensors) if right else {**head, "nullbayes": text}
        save_file(tensors, scratch, said)
        return scratch.read_bytes(), right

    def same(found: Any) -> bool:
        return (
            torch.equal(found[0], wanted[0])
            and torch.equal(found[1], wanted[1])
            and found[2:] == wanted[2:]
        )

    return Target("calibrated posterior" if calibrated else "posterior", raw, read, same, edit)


def _checkpoint_file(folder: Path) -> Target:
    path = folder / "checkpoint.safetensors"
    generator = torch.Generator().manual_seed(2)
    state = {"x": torch.randn(3, 40, generator=generator), "done": torch.tensor(7)}
    state |= {
        "active": torch.tensor([True, False, True]),
        "q": torch.randn(2, 40, generator=generator),
    }
    watch = Watch(path=path, problem="the problem")
    watch.identity = "the weights"
    watch.offer(state, now=True)

    def read(path: Path) -> Any:
        again = Watch(path=path, problem="the problem")
        again.identity = "the weights"
        return again.resume()

    def same(found: Any) -> bool:
        return set(found) == set(state) and all(torch.equal(found[k], v) for k, v in state.items())

    return Target("checkpoint", path.read_bytes(), read, same)


def _idx_file(packed: bool) -> Target:
    values = random.Random(3).randbytes(2 * 30 * 20)
    data = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 30, 20) + values
    whole = gzip.compress(data, mtime=0) if packed else data
    wanted = torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(2, 30, 20)

    def read(path: Path) -> Any:
        if not packed:  # no checksum inside: one beside it
            digest = hashlib.sha256(whole).hexdigest()
            path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
        try:
            return datasets.read_idx(path)
        finally:
            path.with_name(path.name + ".sha256").unlink(missing_ok=True)

    same = lambda found: found.dtype == wanted.dtype and torch.equal(found, wanted)  # noqa: E731
    return Target("packed IDX" if packed else "IDX", whole, read, same)


def _results_file(folder: Path) -> Target:
    path = folder / "results.json"
    names = ("dataset", "methods", "certificate", "prior_path", "curves", "regression", "settings")
    names = (*names, "differences")
    results: dict[str, Any] = {
        n: {"value": [1.0, 0.25, {"name": n}], "text": "x" * 40} for n in names
    }
    results |= {"schema": 2, "environment": {"torch": "2"}}
    write_signed_json(path, results)
    whole = path.read_bytes()

    def edit(rng: random.Random) -> tuple[bytes, bool]:
        return json.dumps(strange(json.loads(whole), rng)).encode(), False

    return Target("results.json", whole, read_results, lambda found: found == results, edit)


def targets(folder: Path) -> list[Target]:
    """Every kind of file that is read back."""
    return [
        _posterior_file(folder, False),
        _posterior_file(folder, True),
        _checkpoint_file(folder),
        _idx_file(False),
        _idx_file(True),
        _results_file(folder),
    ]


def run(start: int, stop: int) -> dict[str, Any]:
    """Files number ``start`` to ``stop``, in turn of every kind: what came of them, by kind of file and of damage."""
    counts: collections.Counter[str] = collections.Counter()
    by_file: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = targets(folder)
        for seed in range(start, stop):
            target = kinds[seed % len(kinds)]
            how, result, error = outcome(target, folder, seed)
            counts[result] += 1
            by_file[target.name][f"{how}: {result}"] += 1
            if result in (WRONG, RAW):
                faults.append(
                    {"seed": seed, "file": target.name, "how": how, "what": result, "error": error}
                )
    return {
        "files": stop - start,
        "counts": dict(counts),
        "by_file": {k: dict(v) for k, v in by_file.items()},
        "faults": faults,
    }
