"""The example of several processes at a tiny size: the same samples in each, and those of one process."""

from __future__ import annotations

import torch

from examples import many_processes


def test_processes_find_what_one_finds() -> None:
    found = many_processes.run(many_processes.SMALL)
    alone, first, second = found
    assert [one["processes"] for one in found] == [1, 2, 2]
    assert torch.equal(first["samples"], second["samples"])
    # Searches that end at a residual of 1e-2 end at different points within it.
    apart = (first["samples"] - alone["samples"]).norm() / alone["samples"].norm()
    assert apart < 0.1
    assert abs(first["novelty"] / alone["novelty"] - 1) < 0.05
    assert first["rows MB"] + second["rows MB"] < 1.1 * alone["rows MB"]
    assert "communication" in many_processes.summary(found)
