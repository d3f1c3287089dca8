"""Processes killed at random points of a fit or of a save; what is left has to serve, or to be refused.

Run as a process of its own (``python -m tests.torture.kills``): it forks a child for each kill, which is safe while
nothing but the main thread runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb


def network() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network and 60 examples whose rows take conjugate gradients about 100 iterations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
        )
        x, y = torch.randn(60, 6, dtype=torch.float64), torch.randint(0, 4, (60,))
    return model.double().eval(), [(x[i : i + 16], y[i : i + 16]) for i in range(0, 60, 16)]


#: prior precision and edge of the null space
ASKED: tuple[tuple[Any, float], ...] = ((1.0, 0.0), (1.0, 1e-4), ("evidence", 0.0))


def fit(
    checkpoint: Path | None, prior: Any = 1.0, delta: float = 0.0, memory: str | None = None
) -> Any:
    """A fit that writes a checkpoint whenever it could."""
    model, batches = network()
    solver = nb.solvers.ConjugateGradient(1e-9, max_iterations=2000)
    posterior = nb.NullSpacePosterior(
        model, delta=delta, solver=solver, prior_precision=prior, memory=memory
    )
    return posterior.fit(batches, 6, progress=False, checkpoint=checkpoint, checkpoint_every=1e-9)


def killed(work: Callable[[], None], after: float) -> bool:
    """Run ``work`` in a child and kill it ``after`` seconds; whether it was still at work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    end = time.monotonic() + after
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def fits(count: int, seed: int) -> dict[str, Any]:
    """Kill fits ``count`` times; each is started again until it ends, and has to give what an undisturbed one gives."""
    rng, kills, resumed = random.Random(seed), 0, 0
    faults: list[str] = []
    start = time.monotonic()
    wanted = {asked: fit(None, *asked)._samples() for asked in ASKED}
    seconds = (time.monotonic() - start) / len(ASKED)
    with tempfile.TemporaryDirectory() as name:
        path, answer, told = (Path(name) / n for n in ("fit.checkpoint", "answer", "told"))

        def work() -> None:
            answer.unlink(missing_ok=True)
            try:
                samples = fit(path, *asked)._samples()
            except Exception as error:
                told.write_text(f"{type(error).__name__}: {error}"[:300])
                raise
            torch.save(samples, answer.with_suffix(".part"))
            answer.with_suffix(".part").rename(answer)

        while kills < count:
            asked = rng.choice(ASKED)
            ended = False
            while not ended:
                last = kills >= count
                ended = not killed(work, 100 * seconds if last else rng.uniform(0, 1.2 * seconds))
                kills += not ended
                resumed += not ended and path.exists()
            if not answer.exists():
                error = told.read_text() if told.exists() else "no answer"
                faults.append(
                    f"after {kills} kills, {asked}: the fit that went on ended in {error}"
                )
                path.unlink(missing_ok=True)
                continue
            found = torch.load(answer)
            answer.unlink()
            told.unlink(missing_ok=True)
            off = float((found - wanted[asked]).abs().max() / wanted[asked].abs().max())
            # With an edge, to the accuracy of a pass; the evidence is kept to a few per cent by a search.
            allowed = 2e-2 if asked[0] == "evidence" else 1e-4 if asked[1] else 1e-6
            if not off < allowed:
                faults.append(f"after {kills} kills, {asked}: samples differ by {off:.1e}")
            left = [
                p.name
                for p in Path(name).iterdir()
                if p.suffix != ".part" or p.name.startswith(".")
            ]
            if left:
                faults.append(f"after {kills} kills: {left} left over")
    return {
        "kills": kills,
        "resumed": resumed,
        "seconds a fit": round(seconds, 3),
        "faults": faults,
    }


def saves(count: int, seed: int) -> dict[str, Any]:
    """Kill processes that save two posteriors to one file in turn: it is always one of the two, whole."""
    rng, faults, kills = random.Random(seed), [], 0
    model, batches = network()
    two = [nb.NullSpacePosterior(model).fit(batches, 40, seed=s, progress=False) for s in (0, 1)]
    wanted = [posterior._samples() for posterior in two]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "posterior.safetensors"

        def work() -> None:
            for i in range(10_000):
                two[i % 2].save(path)

        while kills < count:
            kills += killed(work, rng.uniform(0.0, 0.05))
            if not path.exists():
                continue
            try:
                found = nb.load(path, model)._samples()
            except Exception as error:
                faults.append(f"save, kill {kills}: {type(error).__name__}: {error}"[:300])
                path.unlink()
                continue
            if not any(torch.equal(found, one) for one in wanted):
                faults.append(f"save, kill {kills}: the file is neither of the two")
        two[0].save(path)
        left = [p.name for p in Path(name).iterdir() if p != path]
        if left:
            faults.append(f"{len(left)} temporary files left over: {left[:2]}")
    return {"kills": kills, "faults": faults}


def full_disk() -> dict[str, Any]:
    """No file may grow beyond some kilobytes, as on a full disk: a checkpoint is a warning, a save an error."""
    faults: list[str] = []
    wanted = fit(None)._samples()
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), network()[0]
        good = folder / "posterior.safetensors"
        posterior = fit(None)
        posterior.save(good)
        before = good.read_bytes()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = fit(folder / "fit.checkpoint")._samples()
            said = [
                w
                for w in told
                if issubclass(w.category, nb.NullBayesWarning) and "checkpoint" in str(w.message)
            ]
            if len(said) != 1:
                faults.append(
                    f"{len(said)} warnings of a checkpoint that cannot be written, expected 1"
                )
            if not torch.equal(found, wanted):
                faults.append("a fit whose checkpoint cannot be written gives other samples")
            try:  # rows that have to go to the disk
                fit(None, memory="150kB")
                faults.append("rows went to a full disk")
            except nb.NullBayesError:
                pass
            except Exception as error:
                faults.append(f"rows to a full disk: {type(error).__name__}: {error}")
            try:
                posterior.save(good)
                faults.append("a save to a full disk went through")
            except nb.StorageError:
                pass
            except Exception as error:
                faults.append(f"a save to a full disk: {type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if good.read_bytes() != before or not torch.equal(
            nb.load(good, model)._samples(), posterior._samples()
        ):
            faults.append("a failed save changed the old file")
        left = [p.name for p in folder.iterdir() if p != good]
        if left:
            faults.append(f"left over: {left}")
    return {"faults": faults}


def main() -> int:
    """Exit status 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=150)
    parser.add_argument("--saves", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "fits": fits(asked.fits, asked.seed),
        "saves": saves(asked.saves, asked.seed),
        "full disk": full_disk(),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n")
    return int(any(part["faults"] for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
