"""The command line: what it prints, and its exit codes."""

import subprocess
import sys

import pytest

from nullbayes import cli
from nullbayes.errors import InputError, SolverError


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("demo", "report", "version"))
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("nullbayes ")


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    got = {}

    def fake(*arguments, **options):
        got.update(options, arguments=arguments)

    monkeypatch.setattr("nullbayes.demo.run_demo", fake)
    code = cli.main(
        f"demo --dataset fashion-mnist --out {tmp_path} --data-dir d --seed 3 --examples 7 --samples 5 --epochs 2 "
        "--held-out 8,9".split()
    )
    assert code == 0
    settings, out = got["arguments"]
    assert (settings.dataset, str(settings.data_dir), settings.seed) == ("fashion-mnist", "d", 3)
    assert (settings.examples, settings.samples, settings.epochs) == (7, 5, 2)
    assert settings.held_out == (8, 9) and out == tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--dataset", "cats"], "Unknown data set 'cats'"),
        (["demo", "--dataset", "fashion-mnist", "--data-dir", "no/such"], "dataset-fashion-mnist"),
        (["demo", "--samples", "1"], "at least 2"),
        (["demo", "--held-out", "seven"], "digits with commas"),
        (["report", "no/such/results.json"], "cannot be read"),
        (["demo", "--seed", "x"], "--seed"),
        (["nonsense"], "No such command"),
        (["report"], "Missing argument"),
    ],
)
def test_errors_are_a_message_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert words in " ".join(shown.replace("│", " ").split()) and "Traceback" not in shown


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("a"), 2), (SolverError("b"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("nullbayes.demo.run_demo", fail)
    assert cli.main(["demo"]) == code
    assert "nullbayes: " in capsys.readouterr().err


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("nullbayes.demo.run_demo", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_without_typer_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli, "typer", None)
    assert cli.main(["demo"]) == 2
    assert "nullbayes[demo]" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "nullbayes", "version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("nullbayes ")
