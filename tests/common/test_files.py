"""Files appear whole or not at all; what killed processes left is removed; checksums see every change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nullbayes.common import files
from nullbayes.common.files import atomic_file, checksum


def written(path: Path, text: str) -> None:
    with atomic_file(path) as part:
        part.write_text(text)


def leave_one(path: Path) -> Path:
    """What a process that was killed inside the block leaves."""
    code = (
        "import os, sys; from pathlib import Path; from nullbayes.common.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as part:\n"
        "    part.write_text('half'); part.with_name('.other').write_text('x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (left,) = path.parent.glob("*.part")
    return left


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    leave_one(path)
    written(path, "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "whole"


def test_what_is_being_written_and_what_belongs_to_other_files_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as part:
        part.write_text("mine")
        written(path, "faster")  # the same process is alive
        assert part.exists()
    assert path.read_text() == "mine"
    left = leave_one(tmp_path / "other")
    written(path, "again")
    assert left.exists()


def test_of_another_machine_only_what_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    left = leave_one(path)
    monkeypatch.setattr(files.platform, "node", lambda: "elsewhere")
    written(path, "one")
    assert left.exists()
    os.utime(left, (0, 0))
    written(path, "two")
    assert not left.exists()


def test_a_checksum_sees_names_types_shapes_bytes_and_text() -> None:
    x = torch.arange(6.0)
    told = checksum("text", {"x": x})
    assert told == checksum("text", {"x": x.clone()})
    changed = [
        checksum("texu", {"x": x}),
        checksum("text", {"y": x}),
        checksum("text", {"x": x.double()}),
        checksum("text", {"x": x.reshape(2, 3)}),
        checksum("text", {"x": x, "y": torch.zeros(0)}),
        checksum("text", {"x": x + torch.eye(6)[2] * 1e-6}),
    ]
    assert len({told, *changed}) == 7
    flags = torch.tensor([True, False])
    assert checksum("", {"b": flags}) != checksum("", {"b": ~flags})
    assert checksum("", {"h": torch.ones(2, dtype=torch.bfloat16)}) and checksum(
        "", {"s": torch.tensor(3)}
    )
