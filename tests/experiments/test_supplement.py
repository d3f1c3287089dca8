"""Finished pieces get what they lack, and nothing else is measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments import supplement
from experiments.detection import running
from experiments.detection.base import SCORES
from experiments.store import Store

WANTED = ("nearest input", "GAPA")
REST = [name for name in SCORES if name not in WANTED]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the scores that were measured."""
    log: list[str] = []
    before = running.measured

    def logged(cls: Any, problem: Any) -> dict[str, Any]:
        log.append(cls.name)
        return before(cls, problem)

    monkeypatch.setattr(running, "measured", logged)
    monkeypatch.setattr(supplement, "collected", lambda *_: [])
    return log


def test_a_piece_gets_what_it_lacks(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [j for j in running.jobs("full", [0]) if j.key.method == "gaps, diabetes"]
    monkeypatch.setattr(running, "jobs", lambda *_: jobs)
    store = Store(tmp_path)
    asked = ["detection", "--out", str(tmp_path), "--only", "gaps", "--begin", "--without", *REST]
    assert supplement.main([*asked, "GAPA"]) == 0
    first = store.get(jobs[0].key, jobs[0].config)
    assert first is not None
    assert list(first["result"]["scores"]) == measured == ["nearest input"]
    assert supplement.main(asked) == 0
    second = store.get(jobs[0].key, jobs[0].config)
    assert second is not None
    assert measured == ["nearest input", "GAPA"]
    assert set(second["result"]["scores"]) == set(WANTED)
    assert second["finished"] == first["finished"]  # of the rest; what was added says when
    assert len(second["added"]) == 1
    assert supplement.main(asked) == 0
    assert len(measured) == 2  # nothing is lacking
    other = {**second, "result": {**second["result"], "network": "another", "scores": {}}}
    assert supplement.of_detection(jobs[0], other, REST) is None
