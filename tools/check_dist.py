"""Is what would be published complete, free of results, and enough in an empty environment?

Run by ``make dist`` on a folder with one wheel and one sdist. The names of their files are compared with what each
has to hold; then a new virtual environment gets the wheel with its requirements and nothing else, and a process that
cannot see the source tree runs the three lines of the README. Standard library only: it must not need what it checks.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Beside `nullbayes/` itself. Tests read what they find of these, so an sdist without them could not be tested.
IN_SDIST = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "mkdocs.yml",
    "pyproject.toml",
    "nullbayes/py.typed",
    "nullbayes/report/template.html",
    "nullbayes/report/own.html",
    "tests/project/test_project.py",
    "tools/check_dist.py",
)
PAGES = ("base.html", "parts.html", "template.html", "own.html")
IN_WHEEL = (
    "nullbayes/__init__.py",
    "nullbayes/py.typed",
    *(f"nullbayes/report/{p}" for p in PAGES),
)
SDIST_BYTES = 4 * 2**20  # the library, its tests and the pictures of its documentation, compressed

# A model and loaders under the names that the README's three lines use; torch alone, since no extra is installed.
BEFORE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
train_loader = val_loader = DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 3), batch_size=16)
"""
AFTER = """
assert posterior.certificate.held, posterior.certificate.verdict
"""
# Where the library was imported from: the environment, not a source tree.
PLACE = """
import sys
from importlib.metadata import version
from pathlib import Path

assert Path(nb.__file__).is_relative_to(sys.prefix), nb.__file__
assert nb.__version__ == version("nullbayes") == {version!r}, nb.__version__
"""


def three_lines(readme: str) -> str:
    """The README's first block of Python that fits a posterior. Raises ``ValueError`` where there is none."""
    for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL):
        if "NullSpacePosterior(" in block:
            return str(block)
    raise ValueError("README.md has no block of Python with `NullSpacePosterior(`.")


def faults_of_sdist(names: Iterable[str]) -> list[str]:
    """What is wrong with an sdist of these files (paths below its top folder), a sentence each."""
    names = set(names)
    faults = [f"the sdist lacks {name}" for name in IN_SDIST if name not in names]
    for name in sorted(names):
        if "results" in Path(name).parts[:-1]:
            faults.append(f"the sdist holds results: {name}")
        elif Path(name).parts[0] in ("out", "dist", "site", "build") or ".venv" in name:
            faults.append(f"the sdist holds what make targets wrote: {name}")
    return faults


def faults_of_wheel(names: Iterable[str]) -> list[str]:
    """What is wrong with a wheel of these files, a sentence each."""
    names = set(names)
    faults = [f"the wheel lacks {name}" for name in IN_WHEEL if name not in names]
    inside = re.compile(r"nullbayes(-[^/]+\.dist-info)?/")
    faults += [
        f"the wheel would install {name}, outside of nullbayes/"
        for name in sorted(names)
        if not inside.match(name)
    ]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        faults.append("the wheel lacks its licence")
    return faults


def sdist_names(path: Path) -> list[str]:
    """The files in an sdist, without its top folder."""
    with tarfile.open(path) as archive:
        return [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]


def wheel_names(path: Path) -> list[str]:
    """The files in a wheel."""
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def run_in_empty_environment(wheel: Path, constraints: Path, code: str) -> None:
    """Install the wheel where nothing else is, and run ``code`` there. Raises ``CalledProcessError`` where it fails."""
    # What would let the process see the source tree or another environment.
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "environment"
        venv.create(home, with_pip=True)
        python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        for command in (
            [*pip, "install", "-c", constraints.resolve(), wheel.resolve()],
            [*pip, "check"],
            [python, "-I", "-c", code],  # isolated: neither this folder nor the user's packages
        ):
            subprocess.run(command, cwd=folder, env=environment, check=True)


def only(folder: Path, pattern: str) -> Path:
    """The one file of ``folder`` that matches. Raises ``SystemExit`` where there are none or several."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} should hold one {pattern}, found {[path.name for path in found]}.")
    return found[0]


def main() -> None:
    """Check ``folder``; the exit status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description="Checks a folder with one wheel and one sdist.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--constraints", type=Path, required=True)
    arguments = parser.parse_args()
    wheel, sdist = only(arguments.folder, "*.whl"), only(arguments.folder, "*.tar.gz")
    faults = faults_of_wheel(wheel_names(wheel)) + faults_of_sdist(sdist_names(sdist))
    if sdist.stat().st_size > SDIST_BYTES:
        faults.append(f"the sdist has {sdist.stat().st_size:,} bytes, more than {SDIST_BYTES:,}")
    if faults:
        sys.exit("\n".join(faults))
    version = wheel.name.split("-")[1]
    code = BEFORE + three_lines((ROOT / "README.md").read_text("utf-8")) + AFTER
    run_in_empty_environment(wheel, arguments.constraints, code + PLACE.format(version=version))
    for path in (wheel, sdist):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    print("The wheel ran the README's three lines in an environment of its own.")


if __name__ == "__main__":
    main()
