"""What the experiments on images have in common: one network a seed, and every usual method around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import classification, reports
from experiments.methods import brief, usual
from experiments.runner import Job
from experiments.tasks import Scale


@dataclass(frozen=True)
class ImageTask:
    """An experiment of `classification`, by its name, with what its tables say of the network."""

    name: str
    title: str
    words: str
    scales: Mapping[str, Scale]

    def jobs(
        self,
        setting: str,
        seeds: Sequence[int] | None = None,
        methods: Sequence[str] | None = None,
    ) -> list[Job]:
        """Its pieces; ``seeds`` and ``methods``: None: all of the setting's."""
        scale = self.scales[setting]
        return classification.jobs(
            self.name, setting, scale, seeds or range(scale.seeds), methods or self.usual(setting)
        )

    def usual(self, setting: str) -> list[str]:
        """Methods where none are named."""
        every = usual(setting)
        return every if self.name == "digits_heldout" else brief(every, setting)

    def report(self, setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
        """Write its tables."""
        scale = self.scales[setting]
        reports.classification(self.name, self.title, self.words, setting, scale, runs, folder)
