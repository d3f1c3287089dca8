"""Sizes of memory as people write and read them, and bars."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from support import QUIET, TRAIN, X, Y, assert_threads, network, says

import nullbayes as nb
from nullbayes.common import memory, progress

# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GB", 8 * 2**30),
        ("8 GiB", 8 * 2**30),
        ("1.5g", 3 * 2**29),
        (" 500 MB ", 500 * 2**20),
        (".5k", 512),
        ("2 tb", 2**41),
        ("4096", 4096),
        ("12 B", 12),
        (4096, 4096),
        (1e9, 10**9),
        (1e30, 10**30),
        (np.int64(7), 7),
    ],
)
def test_sizes_as_people_write_them(text: Any, count: int) -> None:
    assert memory.parse_bytes(text) == pytest.approx(count, rel=1e-12)
    assert isinstance(memory.parse_bytes(text), int)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "1.2.3 GB",
        ".",
        "-1",
        "8 XB",
        "8 G B",
        "0",
        "0 GB",
        "1e",
        True,
        None,
        0.5,
        math.nan,
        -math.inf,
    ],
)
def test_sizes_that_are_none(text: Any) -> None:
    with says(nb.InputError, "`memory`", repr(text), "'8GB'"):
        memory.parse_bytes(text)


@given(st.floats(0, 1e16))
def test_sizes_for_people(count: float) -> None:
    text = memory.format_bytes(count)
    number, unit = text.split()
    assert unit in ("B", "kB", "MB", "GB", "TB") and (float(number) <= 1024 or unit == "TB")
    if count >= 1:
        rounding = (
            0.5
            if unit == "B"
            else 0.05 * {"kB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}[unit]
        )
        assert abs(memory.parse_bytes(text) - count) <= 1.01 * rounding + 1


def test_memory_of_this_machine() -> None:
    cpu = torch.device("cpu")
    assert 2**24 < memory.available_bytes(cpu) < 2**50
    assert 2**24 < memory.peak_bytes(cpu) < 2**50


# -- progress ------------------------------------------------------------------------------------


def test_bars_go_to_standard_error_and_vanish(capfd: pytest.CaptureFixture[str]) -> None:
    nb.NullSpacePosterior(network()).fit(TRAIN, 3, progress=True)
    assert capfd.readouterr().out == ""
    nb.NullSpacePosterior(network()).fit(TRAIN, 3, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "items", [[1, 2, 3], iter([1, 2, 3]), []], ids=["list", "unsized", "empty"]
)
@pytest.mark.parametrize("show", [True, False])
def test_tracking_yields_the_items(items: Any, show: bool) -> None:
    items = list(items) if isinstance(items, list) else iter([1, 2, 3])
    wanted = [] if items == [] else [1, 2, 3]
    with progress.stages(show=show) as stage:
        assert list(stage.track(items, "work")) == wanted
        tick = stage.fraction("share")
        if show:
            assert tick is not None and stage._progress is not None
            first, second = stage._progress.tasks
            assert first.total == first.completed == len(wanted)
            tick(0.5)
            assert second.completed == 50
        else:
            assert tick is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_under_a_bar_removes_it(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Progress] = []

    class Watched(Progress):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(progress, "Progress", Watched)
    threads = threading.active_count()

    def broken() -> Any:
        yield TRAIN[0]
        raise error("stop")

    class Loader:
        def __iter__(self) -> Any:
            return broken()

    with pytest.raises(error, match="stop"):
        nb.NullSpacePosterior(network()).fit(Loader(), 3)
    assert len(made) == 1 and not made[0].live.is_started
    assert_threads(threads)


def test_examples_that_are_left_out_are_spoken_of() -> None:
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, 2)

    def told(limit: int | None, given: Any = loader) -> bool:
        posterior = nb.NullSpacePosterior(network())
        notes = posterior.fit(given, 2, max_examples=limit, **QUIET).certificate.notes
        return any(f"3 of {len(X)} examples are constrained" in note for note in notes)

    assert told(3)
    assert not told(None) and not told(len(X)) and not told(len(X) + 5)
    assert not told(3, TRAIN)  # a list of batches has no sampler to ask
