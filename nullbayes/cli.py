"""The command line: ``nullbayes plan|fit|check|evaluate job.py``, ``inspect``, ``report``, ``demo``, ``version``.

Exit codes: 0; 2 after an error that a message explains; 3 where the guarantee is weak or a plan does not fit; 130 after
Ctrl-C.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from nullbayes.errors import InputError, NullBayesError


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


typer = _optional("typer")  # an extra, not part of the default installation

MISSING = "The command line needs typer: pip install 'nullbayes[demo]'"

if typer is not None:
    JobFile = Annotated[
        Path,
        typer.Argument(
            metavar="JOB.PY",
            help="Defines model and train; if it likes validation, test, shifted, likelihood, options.",
        ),
    ]
    OutFolder = Annotated[Path, typer.Option(help="Folder of the run; what is there is used.")]
    AsJson = Annotated[bool, typer.Option("--json", help="Results as JSON on standard output.")]


def demo(
    dataset: Annotated[str, typer.Option(help="digits or fashion-mnist.")] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path(
        "out/demo"
    ),
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with Fashion-MNIST's IDX files.")
    ] = None,
    seed: Annotated[int, typer.Option(help="One seed, one result.")] = 0,
    examples: Annotated[
        int | None, typer.Option(help="Training images whose predictions are preserved.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Weight samples that each posterior draws.")] = 30,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Digits that training never sees, say 3,7.")
    ] = None,
) -> None:
    """Train a network, fit both posteriors, measure, and write a report."""
    from nullbayes.demo import Settings, run_demo

    classes = None if held_out is None else _digits(held_out)
    run_demo(Settings(dataset, data_dir, seed, examples, samples, epochs, classes), out)


WEAK = 3


def plan(job: JobFile, as_json: AsJson = False) -> None:
    """Say what a fit would cost: sizes, memory, time. Nothing is written."""
    from nullbayes.job import read_job
    from nullbayes.job.running import run_plan

    found = run_plan(read_job(job))
    _show(found.as_dict() | {"fits": found.fits}, str(found), as_json=as_json)
    _end(ok=found.fits)


def fit(job: JobFile, out: OutFolder = Path("run"), as_json: AsJson = False) -> None:
    """Fit the posterior, calibrate it on `validation`, and save it."""
    from nullbayes.job import read_job
    from nullbayes.job.running import open_folder, run_fit

    out = out.absolute()  # the file may go elsewhere
    read = read_job(job)
    posterior = run_fit(read, open_folder(out, _say(as_json=as_json)), progress=not as_json)
    certificate = posterior.certificate
    _show(certificate.as_dict(), str(certificate), as_json=as_json)
    _end(ok=certificate.held or not certificate.promises)


def check(job: JobFile, out: OutFolder = Path("run"), as_json: AsJson = False) -> None:
    """Say whether the guarantee holds, measured on all training data."""
    from nullbayes.job import read_job
    from nullbayes.job.running import open_folder, run_check

    out = out.absolute()  # the file may go elsewhere
    read = read_job(job)
    found = run_check(read, open_folder(out, _say(as_json=as_json)), progress=not as_json)
    _show(found.as_dict(), found.verdict, as_json=as_json)
    _end(ok=found.held or read.kind == "laplace")


def evaluate(job: JobFile, out: OutFolder = Path("run"), as_json: AsJson = False) -> None:
    """Measure on `test`, `shifted` and `train`; write results.json and report.html."""
    from nullbayes.job import read_job
    from nullbayes.job.running import open_folder, run_evaluate

    out = out.absolute()  # the file may go elsewhere
    read = read_job(job)
    found = run_evaluate(read, open_folder(out, _say(as_json=as_json)), progress=not as_json)
    _show(found.as_dict(), str(found), as_json=as_json)
    certificate = found.details["certificate"]
    _end(ok=certificate["held"] or read.kind == "laplace")


def inspect(
    file: Annotated[Path, typer.Argument(help="A posterior that `save` or `nullbayes fit` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Print the certificate in a posterior's file, without the model."""
    from nullbayes.posterior.inspection import inspect as inspected

    found = inspected(file)
    _show(found.as_dict(), str(found), as_json=as_json)
    _end(ok=not found.weak)


def _say(*, as_json: bool) -> Callable[[str], None]:
    """Lines for people: on standard error where standard output is for a program."""
    return lambda text: typer.echo(text, err=as_json)


def _show(value: dict[str, Any], text: str, *, as_json: bool) -> None:
    from nullbayes.common.writing import plain

    typer.echo(json.dumps(plain(value), ensure_ascii=False) if as_json else text)


def _end(*, ok: bool) -> None:
    if not ok:
        raise typer.Exit(WEAK)


def report(
    results: Annotated[
        Path, typer.Argument(help="A results.json that `nullbayes evaluate` or `demo` wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; report.html beside the results.")
    ] = None,
) -> None:
    """Render the HTML report from a results.json."""
    from nullbayes.report import read_results, write_report

    path = write_report(read_results(results), out or results.with_name("report.html"))
    typer.echo(f"Written: {path}")


def version() -> None:
    """Print the versions of nullbayes and of what it runs on."""
    from nullbayes.demo.running import environment

    about = environment()
    typer.echo(
        f"nullbayes {about['nullbayes']} (torch {about['torch']}, Python {about['python']}, {about['system']})"
    )


def build_app() -> Any:
    """The typer application."""
    app = typer.Typer(
        help="Uncertainty that preserves what your trained network learned.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (plan, fit, check, evaluate, inspect, report, demo, version):
        app.command()(_explained(command))
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, see above."""
    if typer is None:
        print(MISSING, file=sys.stderr)  # noqa: T201
        return 2
    try:
        build_app()(args=arguments, prog_name="nullbayes")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with errors raised on purpose told in a sentence; all others are bugs and keep their traceback."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except NullBayesError as error:
            typer.echo(f"nullbayes: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("\nnullbayes: stopped; no file was left half-written.", err=True)
            raise typer.Exit(130) from error

    return run


def _digits(text: str) -> tuple[int, ...]:
    try:
        digits = tuple(int(part) for part in text.replace(" ", ",").split(",") if part)
    except ValueError:
        digits = ()
    if not digits or not set(digits) <= set(range(10)):
        raise InputError(
            f"`--held-out` takes digits with commas between them, such as 3,7: got {text!r}."
        )
    return digits


if __name__ == "__main__":
    sys.exit(main())
