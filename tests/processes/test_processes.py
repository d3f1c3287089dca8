"""One, two and three processes give the same answers; one that dies, stalls or differs ends all of them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import answers, asked, endings, meshes
from processes.stage import fitted, loader, network
from support import says
from torch import Tensor

import nullbayes as nb
from nullbayes.common.processes import spread
from nullbayes.distributed import Shard

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT = 240  # seconds that all processes of a test may take

CLOSE = {"float64": 1e-9, "float32": 2e-5}


def played(scene: str, size: int, folder: Path, *, fork: bool = False) -> list[dict[str, dict]]:  # type: ignore[type-arg]
    """The scenes, one after the other, in ``size`` processes; by process and scene what each returned.

    Args:
        fork: from one process, which is cheaper, and all order sets alike, as processes of their own do not.
    """
    path = os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "scenes.py"), scene]
    running = []
    for rank in ["all"] if fork else range(size):
        with (folder / f"said-{size}-{rank}.txt").open("w") as file:
            place = [str(rank), str(size), str(folder)]
            running.append(
                subprocess.Popen(
                    [*command, *place],
                    env=environment,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )
    try:
        codes = [process.wait(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing is left of it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not any(codes), "\n".join(log.read_text() for log in folder.glob(f"said-{size}-*.txt"))
    out = []
    for rank in range(size):
        files = {name: folder / f"{name}-{size}-{rank}.pt" for name in scene.split(",")}
        out.append({n: torch.load(f, weights_only=False) for n, f in files.items() if f.exists()})
    return out


def differences(found: Any, wanted: Any, close: float, path: str = "") -> list[str]:
    """Where two nested results differ by more than ``close``, relative to the largest number beside."""
    if isinstance(wanted, Tensor):
        if found.shape != wanted.shape:
            return [f"{path}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}"]
        size = float(wanted.double().abs().max()) if wanted.numel() else 0.0
        off = float((found - wanted).double().abs().max()) if wanted.numel() else 0.0
        return [f"{path}: {off / size:.1e}"] if off > close * size else []
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), path
        parts = (differences(found[k], v, close, f"{path}/{k}") for k, v in wanted.items())
        return [text for part in parts for text in part]
    if isinstance(wanted, (list, tuple)):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [t for i, (a, b) in pairs for t in differences(a, b, close, f"{path}[{i}]")]
    if isinstance(wanted, float):
        # Figures of the certificate are means of squares that nearly cancel: to fewer digits than samples.
        same = math.isclose(found, wanted, rel_tol=max(100 * close, 1e-6), abs_tol=1e-8)
        return [] if same else [f"{path}: {found}, not {wanted}"]
    return [] if found == wanted else [f"{path}: {found}, not {wanted}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same in one process, without a group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "solver": answers.same_by_solver(),
            "rows": answers.same_by_rows(),
            "updates": answers.same_after_updates(),
            "flat": meshes.same_on_flat_meshes(),
            "within": answers.same_within_layers(),
            "posterior": asked.same_of_a_posterior(),
            "layer": asked.same_by_layer(),
        }


@pytest.fixture(scope="module")
def three(folder: Path) -> list[dict[str, Any]]:
    return played("solver,rows,updates,flat,layer,split,interrupted,lost", 3, folder, fork=True)


@pytest.fixture(scope="module")
def two(folder: Path, three: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # After the three, whose search it goes on with.
    return played("solver,updates,flat,posterior,within,layer,split,sharded,interrupted", 2, folder)


@pytest.fixture
def several(request: pytest.FixtureRequest, size: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = request.getfixturevalue({2: "two", 3: "three"}[size])
    return found


@pytest.mark.parametrize(
    ("scene", "size"),
    [
        ("solver", 3),
        ("rows", 3),
        ("updates", 3),
        ("updates", 2),
        ("flat", 3),
        ("flat", 2),
        ("layer", 3),
        ("solver", 2),
        ("posterior", 2),
        ("within", 2),
        ("layer", 2),
    ],
)
def test_the_answer_is_that_of_one_process(
    scene: str, size: int, several: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    bad = []
    for case, wanted in alone[scene].items():
        close = CLOSE["float32" if "float32" in case else "float64"]
        bad += differences(several[0][scene][case], wanted, close, case)
    assert not bad, "\n".join(bad)
    for other in several[1:]:  # to the last bit: what is decided on one is decided on all
        bad = differences(other[scene], several[0][scene], 0.0)
        assert not bad, "\n".join(bad)


@pytest.mark.parametrize("size", [3, 2])
def test_every_example_is_read_once(size: int, several: list[dict[str, Any]]) -> None:
    read = [n for process in several for n in process["split"]["read"]]
    # Those that all look at, to compare their data, come more than once in one process.
    assert len(read) == len(set(read))
    assert set(read) >= set(range(20)) - {0, 10, 19} - set(range(4))
    for process in several:
        split = process["split"]
        for way in ("padded", "shards", "alone", "after"):
            assert not differences(split[way], split["whole"], 1e-9, way)


@pytest.mark.parametrize("size", [3, 2])
def test_what_differs_or_fails_ends_all_and_is_named(
    size: int, several: list[dict[str, Any]]
) -> None:
    last = size - 1
    for rank, process in enumerate(several):
        split = process["split"]
        kind, text = split["streamed"]
        assert kind == "InputError"
        assert "Shard" in text
        kind, text = split["other data"]
        assert kind == "InputError"
        assert f"{'process' if size == 2 else 'processes'} 1" in text
        assert "values" in text
        kind, text = split["other weights"]
        assert (kind, "weights" in text) == ("ProcessError", True)
        assert f"process {last} of {size}" in text
        kind, text = split["other layers"]
        assert (kind, "`within=`" in text, "nb.load" in text) == ("ProcessError", True, True)
        assert f"in process {', '.join(map(str, range(1, size)))} of {size}" in text
        kind, text = split["other seed"]
        if size == 3:
            assert (kind, "seed" in text, "process 2" in text) == ("ProcessError", True, True)
        kind, text = split["failed"]
        assert kind == ("OSError" if rank == 1 else "ProcessError")
        assert "the disk is gone" in text
        assert rank == 1 or "process 1" in text
        kind, text = split["update alone"]
        assert (kind, "process_group" in text) == ("InputError", True)
        if size == 2:
            products, step = split["host reads"]
            assert products == 0
            assert step <= 4
        processes, rows, sent, stages = split["plan"]
        assert (processes, rows, sent) == (size, 40, True)
        assert "communication" in stages


@pytest.mark.parametrize("size", [3, 2])
def test_a_call_that_differs_in_one_process_is_refused_in_all(
    size: int, several: list[dict[str, Any]]
) -> None:
    for rank, process in enumerate(several):
        for name, (kind, text) in process["split"]["differences"].items():
            odd = rank == size - 1
            if name == "memory" and odd:
                assert (kind, "memory=" in text) == ("MemoryBudgetError", True)
                continue
            assert kind == "ProcessError", (name, text)
            if name == "exchange":
                assert all(words in text for words in ("do not do the same", "a sum of")), text
            else:
                assert f"process {size - 1} " in text, (name, text)
                assert ("MemoryBudgetError" if name == "memory" else f"other {name} ") in text


@pytest.mark.parametrize("size", [3, 2])
def test_threads_take_turns(size: int, several: list[dict[str, Any]]) -> None:
    for process in several:
        for name, found in process["split"]["threads"].items():
            for unit in found:
                assert isinstance(unit, Tensor), unit
                assert not differences(unit, process["split"]["whole"], 1e-9, name)


@pytest.mark.parametrize("size", [3, 2])
def test_which_examples_are_read_is_what_the_data_say(
    size: int, several: list[dict[str, Any]]
) -> None:
    for process in several:
        found = process["split"]["data"]
        for way in ("plain", "batch sampler", "subset", "one shard has all"):
            assert found[way][1:] == (7, 7), way
            assert not differences(found[way][0], found["plain"][0], 1e-9, way)
        examples, reads = found["plan of a shard"]
        assert (examples, set(reads)) == (20, {0, 1})
        assert float(found["of a shard"].abs().max()) < 1e-12
        expected = {
            "moved": "`__iter__` of its own",
            "shuffled in one": "sampler",
            "another choice": "values of items 0, 2, 3",
            "a label": "choice, order or labels",
            "nobody has any": "no batches",
            "nothing to plan": "no examples, in any process",
            "a limit": "Cut the data before",
        }
        for name, words in expected.items():
            kind, text = found[name]
            assert (kind, words in text) == ("InputError", True), (name, text)


@pytest.mark.parametrize("size", [3, 2])
def test_rows_are_spread_evenly(size: int, several: list[dict[str, Any]]) -> None:
    held = [process["split"]["rows"] for process in several]
    whole = [process["split"]["rows whole"] for process in several]
    assert sum(held) == whole[0]
    examples = [len(part) for part in spread(20, size)]
    assert held == [whole[0] * count // 20 for count in examples]


def test_samples_are_spread_over_a_mesh(folder: Path) -> None:
    four = played("mesh", 4, folder, fork=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = meshes.same_on_a_mesh()
    for name, case in wanted.items():
        close = 1e-7 if name == "searched" else 1e-10
        for process in four:
            found = process["mesh"][name]
            assert found.pop("audit")[0] == case["audit"][0]
            assert not differences(found, {k: v for k, v in case.items() if k != "audit"}, close)


def test_a_layer_posterior_takes_shards(two: list[dict[str, Any]]) -> None:
    for process in two:
        for name in ("sample", "mean", "counts", "members", "weight_change"):
            found, wanted = (process["split"][f"layer {way}"][name] for way in ("shards", "whole"))
            assert not differences(found, wanted, 1e-10, name)


def test_a_frozen_base_in_shards(two: list[dict[str, Any]]) -> None:
    for process in two:
        found = process["sharded"]
        for kind in ("null space", "Laplace", "layer"):
            assert not differences(*found[kind], 1e-10, kind)
            assert not differences(*found[f"{kind}, loaded"], 1e-10, kind)
        for when in ("outputs", "outputs after"):
            assert not differences(*found[when], 1e-12, when)
        assert found["kept"] == (True, 27)
        assert found["whole"] == found["plain"]
        assert found["dropped"]
        assert any("full copy of the sharded parameters takes 10.3 kB" in a for a in found["plan"])
        assert "in training mode: ['blocks.0" in found["training"][1]
        kind, text = found["changed"]
        assert kind == "ModelError"
        assert "has changed since" in text
        assert "words.weight" in text


def test_chosen_weights_in_shards_are_refused(two: list[dict[str, Any]]) -> None:
    for process in two:
        found = process["sharded"]
        for case in ("trained", "named"):
            kind, text = found[case]
            assert kind == "ModelError"
            assert "['0.weight']" in text
            assert "ignored_params" in text
            assert "full state dict" in text
        assert not differences(found["last"], found["last of the plain"], 1e-10)
        for way in ("mesh", "wrapped"):
            assert not differences(found[way], process["split"]["whole"], 1e-9, way)


def test_a_search_goes_on_in_fewer_processes(
    folder: Path, three: list[dict[str, Any]], two: list[dict[str, Any]]
) -> None:
    for several in (three, two):
        for process in several:
            assert "interrupted" in process["interrupted"]["status"]
            assert not differences(process["interrupted"], several[0]["interrupted"], 0.0)
    path = folder / "search.safetensors"
    assert path.exists()
    wanted = endings.finished(None)
    found = endings.finished(folder)
    assert not path.exists()  # it has served
    assert found.pop("iterations") < wanted.pop("iterations")
    found.pop("status")
    assert not differences(found, wanted, 1e-6)


@pytest.mark.parametrize("how", ["stalled", "killed"])
def test_a_process_that_is_lost_ends_all(how: str, three: list[dict[str, Any]]) -> None:
    (kind, text), seconds = three[0]["lost"][how]
    assert kind == "ProcessError"
    assert "process 1" in text  # the second of three, and then of the two that are left
    assert ("not been heard of" if how == "killed" else "stalls") in text
    assert seconds < 60


def test_ranges_cover_everything_once() -> None:
    for count in (0, 1, 2, 7, 10):
        for size in (1, 2, 3, 8):
            parts = spread(count, size)
            assert [n for part in parts for n in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_without_a_group_nothing_changes() -> None:
    with says(nb.InputError, "process_group", "init_process_group"):
        nb.NullSpacePosterior(network(), process_group="all").fit(loader(8), 2, progress=False)
    found = fitted(nb.NullSpacePosterior(network()), Shard(loader(8)), 2)
    wanted = fitted(nb.NullSpacePosterior(network()), loader(8), 2)
    assert not differences(found, wanted, 0.0)
