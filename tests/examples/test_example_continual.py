"""Digits two at a time, at a tiny size: outputs on earlier data stand inside the null space, and only there."""

from __future__ import annotations

from examples import continual


def test_only_the_null_space_keeps_earlier_outputs() -> None:
    found = continual.run(continual.SMALL, 12)
    assert set(found) == {"plain", "null space", "EWC, 100"}
    assert max(found["null space"]["outputs moved"]) < 1e-4
    assert max(found["plain"]["outputs moved"]) > 1e-2
    assert max(found["EWC, 100"]["outputs moved"]) > 1e-3
    assert all(0.3 < a <= 1 for a in found["null space"]["task known"])
    assert "null space" in continual.summary(found)
