"""``nullbayes evaluate`` on the demonstration's network, killed at four points of its way, ends as if it never was."""

from __future__ import annotations

import multiprocessing
import re
import signal
from pathlib import Path

import pytest
import torch

from nullbayes import cli

JOB = """
import os
import signal
from pathlib import Path

import torch
from torch.nn import functional as F

from nullbayes.demo import Settings
from nullbayes.demo.tasks import make_task

task = make_task(Settings(examples=30, test_images=40))
model, data = task.model, task.data
optimiser = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(10):
    optimiser.zero_grad()
    F.cross_entropy(model(data.train.inputs), data.train.targets).backward()
    optimiser.step()
model.eval()


def reached(point):
    if os.environ.get("KILL_AT") == point:
        os.kill(os.getpid(), signal.SIGKILL)


class Batches:
    def __init__(self, split, name):
        self.split, self.name = split, name

    def __iter__(self):
        for start in range(0, len(self.split), 20):
            if start:
                reached(self.name)
            yield self.split.inputs[start : start + 20], self.split.targets[start : start + 20]


renamed = Path.replace


def replace(self, target):
    reached(Path(target).name)  # written under another name, not yet under its own
    return renamed(self, target)


Path.replace = replace
train, validation = Batches(data.train, "train"), (data.validation.inputs[:60], data.validation.targets[:60])
test = Batches(data.test, "test")
shifted = {"noise": task.shifts["noise"].inputs[:40]}
options = {"num_samples": 4, "seed": 0}
"""
# Where it is killed, and the files that are there by then.
POINTS = {
    "train": set[str](),
    "posterior.safetensors": set[str](),
    "test": {"posterior.safetensors"},
    "report.html": {"posterior.safetensors", "results.json"},
}


@pytest.mark.slow
def test_killed_at_every_step_the_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "replace", Path.replace)  # put back what the job changes
    (tmp_path / "job.py").write_text(JOB)
    killed = tmp_path / "killed"
    with torch.random.fork_rng(devices=[]):
        assert cli.main(["evaluate", "job.py", "--out", "whole"]) in (0, 3)
        for point, whole in POINTS.items():
            monkeypatch.setenv("KILL_AT", point)
            # Forked after a run, since a new interpreter would import for longer than it works.
            process = multiprocessing.get_context("fork").Process(
                target=cli.main, args=(["evaluate", "job.py", "--out", "killed"],)
            )
            process.start()
            process.join(timeout=240)
            assert process.exitcode == -signal.SIGKILL, point
            there = {p.name for p in killed.iterdir() if not p.name.endswith(".part")}
            assert there - {"log.txt", "fit.checkpoint"} == whole, point
        monkeypatch.delenv("KILL_AT")
        assert cli.main(["evaluate", "job.py", "--out", "killed"]) in (0, 3)
    names = ["log.txt", "posterior.safetensors", "report.html", "results.json"]
    for folder in ("killed", "whole"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == names, folder
    for name in ("results.json", "report.html"):
        ours, theirs = (
            re.sub(r"\s+", " ", (tmp_path / f / name).read_text()) for f in ("killed", "whole")
        )
        assert ours == theirs, name
