"""What stands beside the code says what is so: versions, make targets, workflows, packages, imports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from tools import check_dist

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
in_a_checkout = pytest.mark.skipif(
    not (ROOT / ".github").exists(), reason="an sdist has no workflows and no results"
)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def texts() -> dict[str, str]:
    """Every text file of the repository by its path; without git (an sdist), of the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    paths = [ROOT / name for name in names if name] or [
        p for p in ROOT.rglob("*") if ".venv" not in str(p.relative_to(ROOT))
    ]
    found = {}
    for path in paths:
        # The evaluation's tables are figures, fourteen million characters of them.
        if path.is_file() and "results" not in path.parts:
            try:
                found[path.relative_to(ROOT).as_posix()] = path.read_text("utf-8")
            except UnicodeDecodeError:
                continue
    return found


# -- make targets ----------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", read("Makefile"), flags=re.MULTILINE))


def calls(text: str) -> set[str]:
    """The targets of ``make``: in backticks, at the start of a line of a code block, after `entry:`."""
    return set(re.findall(r"(?:^[ \t]*|`|entry: )make ([a-z][a-z-]*)", text, flags=re.MULTILINE))


def test_the_reader_of_make_targets_reads() -> None:
    assert {"test", "dist", "lint"} <= targets()
    assert calls("`make one`\n    make two X=1\nwe make three\n  entry: make four") == {
        *("one", "two", "four")
    }


PROSE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".pre-commit-config.yaml", ".ci/run"]


@pytest.mark.parametrize("page", [*PROSE, "docs"])
def test_every_make_target_that_is_named_exists(page: str) -> None:
    path = ROOT / page
    if page.startswith(".") and not path.exists():
        pytest.skip("not in an sdist")
    pages = sorted(path.rglob("*.md")) if path.is_dir() else [path]
    named = set().union(*(calls(p.read_text("utf-8")) for p in pages))
    assert named - targets() == set()
    assert named or page in ("docs", "CHANGELOG.md")


def test_phony_targets_and_help_name_every_target() -> None:
    phony = set(
        " ".join(re.findall(r"^\.PHONY:(.*)$", read("Makefile"), flags=re.MULTILINE)).split()
    )
    assert phony == targets()
    shown = set(re.findall(r"make ([a-z][a-z-]*)", read("Makefile")))
    assert targets() - shown <= {"help", "install"}


# -- workflows -------------------------------------------------------------------------------------

CALLED = ("test", "lint", "docs", "dist", "torture")


def jobs() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in WORKFLOWS:
        found |= yaml.safe_load(path.read_text("utf-8"))["jobs"]
    return found


def commands(job: dict[str, Any]) -> list[str]:
    """What a job runs, once for each `target` of its matrix."""
    names = job.get("strategy", {}).get("matrix", {}).get("target", [""])
    runs = [step["run"] for step in job["steps"] if "run" in step]
    return [run.replace("${{ matrix.target }}", name) for run in runs for name in names]


@in_a_checkout
def test_workflows_call_make_targets_and_nothing_else() -> None:
    for path in WORKFLOWS:
        read_as = yaml.safe_load(path.read_text("utf-8"))
        assert read_as["permissions"] == {"contents": "read"}
        assert all("timeout-minutes" in job for job in read_as["jobs"].values())
    run = {command for job in jobs().values() for command in commands(job)}
    assert called_by(run) == set(CALLED)


def called_by(run: set[str]) -> set[str]:
    """The targets of these commands. Anything but `make target VARIABLE=value` is an error."""
    matches = [
        (command, re.fullmatch(r"make ([a-z-]+)(?: [A-Z]+=\S.*)?", command)) for command in run
    ]
    assert [command for command, match in matches if match is None] == []
    return {match[1] for _, match in matches if match is not None}


@pytest.mark.parametrize("target", CALLED)
def test_workflows_call_targets_that_exist(target: str) -> None:
    assert target in targets()


@in_a_checkout
def test_the_matrix_is_what_is_promised() -> None:
    matrix = jobs()["test"]["strategy"]["matrix"]
    languages = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert matrix["python"] == languages
    assert PROJECT["requires-python"] == f">={languages[0]}"
    oldest = re.search(r"torch>=([\d.]+)", "\n".join(PROJECT["dependencies"]))
    pinned = re.search(r"^torch==([\d.]+)$", read("constraints.txt"), flags=re.MULTILINE)
    assert oldest and pinned
    assert matrix["torch"] == [f"{oldest[1]}.0", pinned[1]]
    assert f'python_version = "{languages[0]}"' in read("pyproject.toml")  # mypy's


@in_a_checkout
def test_hooks_before_a_commit_are_make_targets() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert entries == ["make format", "make types", "make layers"]


# -- the files beside the code ---------------------------------------------------------------------


def test_the_changelog_ends_at_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", read("CHANGELOG.md"), flags=re.MULTILINE)
    versions = [version for version, _ in headings]
    assert versions[0] in ("Unreleased", PROJECT["version"])
    assert next(v for v in versions if v != "Unreleased") == PROJECT["version"]
    for version, date in headings:
        assert (version == "Unreleased") == (date == "")
        assert date == "" or re.fullmatch(r"\d{4}-\d\d-\d\d", date)
        assert f"\n[{version}]: {PROJECT['urls']['Repository']}/" in read("CHANGELOG.md")


def test_the_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    for key in ("cff-version", "message", "title", "authors", "version", "license"):
        assert citation[key], key
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert f"[{citation['version']}] - {citation['date-released']}" in read("CHANGELOG.md")
    (paper,) = citation["references"]
    assert [a["family-names"] for a in paper["authors"]] == ["Miani", "Roy", "Hauberg"]
    assert all({"type", "title", "authors"} <= set(r) for r in citation["references"])


def test_the_guide_names_every_room() -> None:
    guide = read("CONTRIBUTING.md")
    rooms = [path.parent.name for path in (ROOT / "nullbayes").glob("*/__init__.py")]
    assert len(rooms) >= 5
    assert [room for room in rooms if f"{room}/" not in guide] == []


@in_a_checkout
def test_the_guide_points_at_files_that_exist() -> None:
    guide = read("CONTRIBUTING.md")
    linked = re.findall(r"\]\((?!http)([^)#]+)", guide)
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?|[\w./-]+\.(?:py|toml|txt|cff))`", guide)
    assert len(linked) >= 3 and len(named) >= 8
    places = (ROOT, ROOT / "nullbayes")  # rooms are named without their house
    made = ("dist/", "site/")
    for name in {*linked, *named} - {*made}:
        assert any((place / name).exists() for place in places), name


def test_no_text_names_a_machine() -> None:
    """No path of a home, a work folder or a temporary one, and no address of a package index."""
    somebody = re.compile(
        r"(?<![\w.:/~*}-])/(?:work|tmp|home|root|Users|opt|mnt|scratch)/|[A-Z]:\\Users"
    )
    index = re.compile(r"index-url[ =]|\bpypi\.org/simple|download\.pytorch\.org")
    found = texts()
    assert len(found) > 100
    named = [
        f"{name}: {line.strip()[:100]}"
        for name, text in found.items()
        if name != "tests/project/test_project.py"
        for line in text.splitlines()
        if somebody.search(line) or index.search(line)
    ]
    assert named == []
    assert somebody.search("see /tmp/x") and somebody.search('"/home/me/a"')


# -- what is published -----------------------------------------------------------------------------


ADDED = ("LICENSE", "README.md", "pyproject.toml")


def names_in(builder: SdistBuilder | WheelBuilder) -> list[str]:
    """What the builder's lists include; it adds the files of ``ADDED`` whatever the lists say."""
    return [f.distribution_path for f in builder.recurse_included_files()]


def test_the_sdist_holds_what_it_needs_and_no_results() -> None:
    names = names_in(SdistBuilder(str(ROOT)))
    assert check_dist.faults_of_sdist([*names, *ADDED]) == []
    assert sum((ROOT / name).stat().st_size for name in names) < 8.0e6


def test_the_wheel_holds_the_library_alone() -> None:
    names = names_in(WheelBuilder(str(ROOT)))
    assert check_dist.faults_of_wheel([*names, "nullbayes-0.dist-info/licenses/LICENSE"]) == []
    assert "Typing :: Typed" in PROJECT["classifiers"]


@in_a_checkout
def test_results_in_an_sdist_are_seen() -> None:
    """The same builder without the list of what to leave out: the check above has to speak."""
    config = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]
    builder = SdistBuilder(
        str(ROOT), config={"build": {"targets": {"sdist": {"include": config["include"]}}}}
    )
    faults = check_dist.faults_of_sdist([*names_in(builder), *ADDED])
    for folder in ("benchmarks/results/", "experiments/results/"):
        assert any(fault.startswith(f"the sdist holds results: {folder}") for fault in faults)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tests/test_a.py", *check_dist.IN_WHEEL], "outside of nullbayes/"),
        (["nullbayes/__init__.py"], "lacks nullbayes/py.typed"),
        (list(check_dist.IN_WHEEL), "lacks its licence"),
    ],
)
def test_faulty_wheels_are_seen(names: list[str], said: str) -> None:
    assert any(said in fault for fault in check_dist.faults_of_wheel(names))


def test_the_three_lines_run_on_what_make_dist_gives_them(tmp_path: Path) -> None:
    """As `make dist` runs them in an empty environment, where it takes a minute; here they take a second."""
    block = check_dist.three_lines(read("README.md"))
    assert ".fit(" in block and "certificate" in block
    done = subprocess.run(
        [sys.executable, "-c", check_dist.BEFORE + block + check_dist.AFTER],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# -- what an import costs --------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """This source tree first, whatever is installed."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_an_import_takes_no_extra_and_few_modules(tmp_path: Path) -> None:
    """Beside torch and NumPy, and without a warning: what the report and the command line need stays out."""
    code = (
        "import sys, json, torch, numpy; before = set(sys.modules); import nullbayes; "
        "print(json.dumps([nullbayes.__file__, sorted(set(sys.modules) - before)]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    place, modules = json.loads(done.stdout)
    assert Path(place) == ROOT / "nullbayes" / "__init__.py"
    tops = {name.partition(".")[0] for name in modules}
    extras = {"typer", "matplotlib", "jinja2", "sklearn", "scipy", "pandas", "torchmetrics"}
    later = {
        "transformers",
        "peft",
        "lightning",
        "pytorch_lightning",
        "skorch",
        "botorch",
        "gpytorch",
        "jax",
    }
    assert tops & (extras | later) == set()
    strange = [name for name in modules if not name.startswith("nullbayes")]
    assert len(strange) < 100, strange  # 61 with rich 15 and safetensors 0.8
