"""One JSON file for each thing measured: written whole or not at all, skipped when it is there already."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from nullbayes.common.writing import plain, write_json

ROOT = Path(__file__).parent.parent
# Finished pieces and trained networks; processes of a run read it from the environment too.
OUT = Path(os.environ.get("NULLBAYES_EXPERIMENTS", ROOT / "out" / "experiments"))
RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass(frozen=True)
class Key:
    """What was measured: one method of one experiment, from one seed."""

    experiment: str
    setting: str
    seed: int
    method: str

    def __str__(self) -> str:
        return f"{self.experiment}, seed {self.seed}, {self.method}"


class Store:
    """The folder of finished pieces, ``<setting>/<experiment>/<method>-seed<k>.json``."""

    def __init__(self, folder: Path = OUT) -> None:
        self.folder = folder

    def path(self, key: Key) -> Path:
        name = re.sub(r"[^A-Za-z0-9_.+=-]+", "_", key.method)
        return self.folder / key.setting / key.experiment / f"{name}-seed{key.seed}.json"

    def get(self, key: Key, config: dict[str, Any]) -> dict[str, Any] | None:
        """The finished piece, or None where there is none or it was made with other settings."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            stored: dict[str, Any] = json.loads(path.read_text())
        except json.JSONDecodeError:  # not ours: what we write is whole
            return None
        # Rounded as committed tables are, from which pieces may have been adopted.
        same = rounded(stored.get("config")) == rounded(plain(config))
        return stored if same and stored.get("schema") == SCHEMA else None

    def put(
        self, key: Key, config: dict[str, Any], result: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Write one piece with where and when it was measured; returns what was written."""
        now = datetime.datetime.now(datetime.timezone.utc)
        record = {
            "schema": SCHEMA,
            **asdict(key),
            "config": config,
            "result": result,
            "seconds": seconds,
            "finished": now.isoformat(timespec="seconds"),
            "environment": environment(),
        }
        write_json(self.path(key), record)
        return plain(record)

    def adopt(self, runs: Iterable[dict[str, Any]]) -> int:
        """Take a table's runs as pieces where there are none; :meth:`get` still asks for the same settings.

        Runs marked ``partial``, of which a table holds less than its report needs, are left out.
        """
        count = 0
        for record in runs:
            if record.get("partial"):
                continue
            path = self.path(Key(*(record[k] for k in ("experiment", "setting", "seed", "method"))))
            if not path.exists():
                write_json(path, record)
                count += 1
        return count

    def seconds(self, key: Key) -> float | None:
        """How long this piece took when it was last made, with whatever settings."""
        try:
            return float(json.loads(self.path(key).read_text())["seconds"])
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            return None


def collected(setting: str, experiment: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The runs behind a table, as committed beside it; empty where there are none."""
    path = results / setting / f"{experiment}.json"
    if not path.is_file():
        return []
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return runs


def rounded(value: Any, digits: int = 6) -> Any:
    """Floats to six significant digits: what is committed should not be twice as long for nothing."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return value


def by_method(runs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each method, by seed."""
    out: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda r: r["seed"]):
        out.setdefault(run["method"], []).append(run)
    return out
