"""Runs that spread over processes and end in time; networks trained with one cycle; functions that guess."""

from __future__ import annotations

import functools
import json
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from experiments import joint, networks, together
from experiments.detection.families import CLOTHES, Size
from experiments.detection.training import OneCycle, _Augmented, one_cycle
from experiments.layers.problems import families
from experiments.runner import Job, needs, run, spread
from experiments.store import Key, Store
from experiments.tasks import small_resnet
from nullbayes.datasets import Split


def key(method: str, seed: int = 0, experiment: str = "some") -> Key:
    return Key(experiment, "small", seed, method)


def slept(seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {"slept": seconds}


def test_what_comes_first() -> None:
    network = Job(key("network"), {}, slept, keep=False)
    method = Job(key("method"), {}, slept)
    other = Job(key("method", seed=1), {}, slept)
    features = Job(key("a: features"), {}, slept)
    layers = Job(key("a: layers", experiment="rest"), {}, slept, after=features.key)
    early = Job(key("b: layers", experiment="rest"), {}, slept, after=key("is not asked for"))
    jobs = [network, method, other, features, layers, early]
    assert needs(jobs) == [set(), {0}, set(), {0}, {3}, set()]


def test_a_job_waits_for_what_it_needs_and_for_nothing_else() -> None:
    first = Job(key("first"), {}, slept)
    jobs = [first, Job(key("second"), {}, slept, after=first.key), Job(key("third"), {}, slept)]
    log: list[tuple[str, str]] = []
    third = threading.Event()

    def one(number: int, job: Job) -> None:
        log.append(("begins", job.key.method))
        if number == 2:
            third.set()
        elif number == 0:
            assert third.wait(60)
        log.append(("ends", job.key.method))

    told: list[tuple[str, int]] = []
    spread(jobs, one, 2, lambda job: told.append((job.key.method, threading.get_ident())))
    assert sorted(told) == sorted((j.key.method, threading.get_ident()) for j in jobs)
    assert log.index(("begins", "second")) > log.index(("ends", "first"))
    assert log.index(("begins", "third")) < log.index(("ends", "first"))
    assert sorted(log) == sorted((w, j.key.method) for j in jobs for w in ("begins", "ends"))


def test_time_is_kept_and_what_is_finished_stays(tmp_path: Path) -> None:
    store, console = Store(tmp_path / "pieces"), Console(quiet=True)
    jobs = [Job(key(f"{s:g}", s), {}, slept, (s,)) for s in (0, 60)]
    run(jobs[:1], store, console=console, workers=2)
    started = time.monotonic()
    found = run(jobs, store, console=console, workers=2, seconds=1)
    assert time.monotonic() - started < 30  # far from the minute that the second would take
    assert [r["result"]["slept"] for r in found.runs] == [0]
    assert found.stopped == [str(jobs[1].key)]
    assert found.failures == {}
    again = run(jobs, store, console=console, fresh=False, seconds=-1)
    assert [r["result"]["slept"] for r in again.runs] == [0]
    assert together.pack(store, tmp_path / "all.tar.gz") == 1
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    assert Store(tmp_path / "there").get(jobs[0].key, {}) == store.get(jobs[0].key, {})


def test_parts_are_pieces_of_the_experiments_and_each_is_in_one() -> None:
    names = [part.name for part in together.PARTS]
    jobs = together.jobs(names)
    keys = [(j.key.setting, str(j.key)) for j in jobs]
    assert len(keys) == len(set(keys))
    for experiment, setting in {(p.experiment, p.setting) for p in together.PARTS}:
        every = together.load(experiment).jobs(setting, None, None)
        mine = [j for j in jobs if (j.key.experiment, j.key.setting) == (experiment, setting)]
        assert {str(j.key) for j in mine} == {str(j.key) for j in every}
    clothes = together.jobs(["clothes"])
    assert len(clothes) == 3 * len(CLOTHES) == 15


def test_sizes_that_are_usual_leave_no_trace_in_what_pieces_depend_on() -> None:
    assert "widths" not in Size().config()
    assert Size(widths=(8, 16)).config()["widths"] == (8, 16)
    assert json.loads(json.dumps(Size().config()))["preserved"] == 500


def test_one_cycle_learns_and_ends_as_it_began() -> None:
    x = torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(256) % 2
    x[y == 1, :, 10:18] = 1.0  # a bar that mirror images and moves leave where it is
    split = Split(x, y)
    torch.manual_seed(0)
    network = small_resnet(2, widths=(4, 8))
    one_cycle(network, split, OneCycle(6, 64, 0.1, 1e-3), 0, torch.device("cpu"))
    assert not network.training
    assert all(p.is_contiguous() for p in network.parameters())
    with torch.no_grad():
        assert float((network(x).argmax(1) == y).float().mean()) > 0.95


def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(96, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    split, recipe = Split(x, torch.arange(96) % 2), OneCycle(3, 32, 0.1, 1e-3)

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return small_resnet(2, widths=(4, 8))

    whole, stopped, found = network(), network(), network()
    one_cycle(whole, split, recipe, 0, torch.device("cpu"))
    path, calls = tmp_path / "some.unfinished", []

    def step(self: torch.optim.SGD) -> None:
        calls.append(self)
        if len(calls) == 5:  # within the second epoch
            raise KeyboardInterrupt
        plain(self)

    plain = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(KeyboardInterrupt):
        one_cycle(stopped, split, recipe, 0, torch.device("cpu"), path)
    monkeypatch.undo()
    one_cycle(found, split, recipe, 0, torch.device("cpu"), path)
    assert not path.exists()
    for ours, theirs in zip(found.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_moves_and_mirror_images_are_of_up_to_two_pixels() -> None:
    x = torch.zeros(64, 1, 9, 9)
    x[:, :, 4, 4] = 1.0
    moved = _Augmented(torch.nn.Identity(), 0).train()(x)
    rows, columns = moved.sum(3).squeeze(1).argmax(1), moved.sum(2).squeeze(1).argmax(1)
    assert moved.sum() == 64
    assert sorted(rows.unique().tolist()) == sorted(columns.unique().tolist()) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("classes", [2, 5])
def test_functions_that_guess(classes: int) -> None:
    """Against functions drawn at random, of which there are more than groups can tell apart."""
    targets = torch.arange(40) % classes
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, classes, (20_000, 40), generator=generator)
    anchors, which = joint.groups(40, 0)
    used = anchors.gather(1, which)
    right = (drawn[:, used[:200]] == targets[used[:200]]).all(2).double().mean(0)
    found = joint.guessed(targets, classes, 0)["clean"]["joint"]
    assert found == pytest.approx(-float(right.log().mean()) / joint.LABELS, rel=0.03)


def test_wider_samples_keep_their_mean() -> None:
    outputs = torch.randn(6, 10, 3, generator=torch.Generator().manual_seed(0))
    wider = joint.spread(lambda x: outputs, 3.0)(torch.zeros(10))
    assert torch.allclose(wider.mean(0), outputs.mean(0), atol=1e-6)
    assert torch.allclose(wider.std(0), 3 * outputs.std(0), rtol=1e-4)


def test_the_width_is_the_one_of_least_joint_nll() -> None:
    """Samples that are right or wrong together, too narrow by ten: the widest that helps is chosen."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, (60,), generator=generator)
    signs = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0)[:, None, None]
    toward = torch.nn.functional.one_hot(targets, 2).float()
    draws = functools.partial(torch.mul, 0.3 * signs * toward)
    width = joint.widened(lambda x: draws(torch.ones(1)), (torch.zeros(60), targets), 0)
    scores = {}
    for tried in joint.WIDTHS:
        p = (tried * 0.3 * signs * toward).double().softmax(2)
        scores[tried] = joint.figures(p, targets, 0)["joint"]
    assert width == min(scores, key=lambda k: scores[k])
    assert scores[width] < scores[1.0]


@pytest.mark.parametrize("member", ["wine", "iris"])
def test_a_table_is_learned_below_the_top_fifth_of_a_column(
    member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "FOLDER", tmp_path)
    family = families("small")["tabular"]
    found = family.make(member, 0, family.sizes["small"])
    edge = found.near["top fifth"][:, 0].min()
    for inputs in (found.given.train.inputs, found.test.inputs, found.given.reference):
        assert inputs[:, 0].max() < edge
    assert len(found.near["top fifth"]) >= 20
