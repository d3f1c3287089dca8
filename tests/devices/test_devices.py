"""Posteriors on other devices: every scene on a GPU where there is one, else on a device that stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from tests.devices.scenes import compare, scenes

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available()
# Older than PyTorch 2.9 have no devices written in Python.
KNOWN = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@pytest.mark.skipif(GPU or not KNOWN, reason="a GPU is at hand, or no device can stand in")
def test_a_device_that_stands_in() -> None:
    """In a process of its own: see there."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", str(Path(__file__).with_name("stand_in.py"))],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore::nullbayes.errors.NullBayesWarning")  # of tiny data
@pytest.mark.skipif(not GPU, reason="no GPU at hand")
@pytest.mark.parametrize("name", scenes() if GPU else ["all of them"])
def test_a_gpu_gives_the_same(name: str) -> None:
    scene = scenes()[name]
    found = scene(lambda x: x.to("cuda"))
    compare(scene(lambda x: x), found, 2e-2 if "float32" in name else 1e-5)
