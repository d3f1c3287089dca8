"""One thread a worker, since xdist already uses every core; and which tests `make test-fast` leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch

from nullbayes.fit import pipeline

torch.set_num_threads(1)

# Measured with `make test ARGS=--durations=80`: what takes more than a few seconds, or trains networks, or starts
# processes of its own.
SLOW_ROOMS = (
    "audit",
    "cases",
    "docs",
    "examples",
    "experiments",
    "processes",
    "project",
    "torture",
)
SLOW_TESTS = (
    "test_an_interrupt_in_any_forward_pass",
    "test_as_a_module",
    "test_demo.py",
    "test_files.py",
    "test_peak_memory",
    "test_report",
    "test_samples_with_a_shift_have_the_promised_covariance",
    "test_the_cut_into_batches",
    "test_the_estimate_is_that_of_data_never_seen",
    "test_a_fit_goes_on_from_each_of_its_checkpoints",
    "test_update_remove_and_merge",
    "test_cli_job.py",
    "test_evaluation",
    "test_projection.py",
    "test_generative",
    "test_scale.py",
    "test_layer_posterior.py",
    "test_scikit_learns_checks_of_estimators",
    "test_lightning.py",
    "test_botorch.py",
    "test_graphs.py",
)
# Rooms and files with a fixture that many tests share and that takes seconds.
SHARED = (
    "processes",
    "test_distil",
    "test_distil_tokens",
    "test_demo",
    "test_examples_other",
    "test_report",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each of those on one worker, so that the fixture is made once; all other tests where a worker is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = PurePosixPath(nodeid.split("::")[0])
            shared = [name for name in (path.parent.name, path.stem) if name in SHARED]
            return shared[0] if shared else nodeid

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        room = item.path.parent.name
        if room in SLOW_ROOMS or any(name in item.nodeid for name in SLOW_TESTS):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def audits_run_to_their_end() -> Iterator[None]:
    """An audit may end early to save time: on a busy machine a test would see another certificate each run."""
    least, pipeline.LEAST_AUDIT = pipeline.LEAST_AUDIT, 1e9
    yield
    pipeline.LEAST_AUDIT = least
