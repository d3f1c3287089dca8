"""From results to one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nullbayes.common.writing import read_signed_json, write_text
from nullbayes.errors import MissingExtraError, NullBayesError, StorageError
from nullbayes.posterior.evaluation import KIND as EVALUATION
from nullbayes.posterior.evaluation import SCHEMA as EVALUATION_SCHEMA
from nullbayes.report import words

SCHEMA = 2
_NEEDED = (
    "dataset",
    "methods",
    "differences",
    "certificate",
    "prior_path",
    "curves",
    "regression",
    "settings",
    "environment",
)


_OF_EVALUATION = (
    "figures",
    "verdicts",
    "detection",
    "train",
    "classes",
    "slices",
    "thresholds",
    "methods",
    "curves",
    "certificate",
    "settings",
)


def require_packages() -> None:
    """Stop now, with the line that mends it, if a package that draws the report is missing."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"The report needs {' and '.join(missing)}: pip install 'nullbayes[report]'."
        )


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a ``results.json`` of the demonstration or of an evaluation.

    Raises:
        StorageError: any other file, or a damaged one.
    """
    path = Path(path)
    results = read_signed_json(path, "Run the command that wrote it again.")
    if results.get("kind") == EVALUATION:
        return _checked_evaluation(path, results)
    missing = [key for key in _NEEDED if key not in results]
    if missing:
        raise StorageError(
            f"{path} is not a results file of `nullbayes demo`: it lacks {', '.join(missing)}."
        )
    if results.get("schema") != SCHEMA:
        raise StorageError(
            f"{path} has layout {results.get('schema')!r}, this version reads {SCHEMA}: run `nullbayes demo` again."
        )
    return results


def _checked_evaluation(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    if results.get("schema") != EVALUATION_SCHEMA:
        raise StorageError(
            f"{path} has layout {results.get('schema')!r}, this version reads {EVALUATION_SCHEMA}: evaluate again."
        )
    missing = [key for key in _OF_EVALUATION if key not in results]
    if missing:
        raise StorageError(f"{path} is not a whole evaluation: it lacks {', '.join(missing)}.")
    return results


def environment() -> Any:
    """The templates of this folder, with text escaped."""
    import jinja2

    def source(name: str) -> str:
        return files("nullbayes.report").joinpath(name).read_text(encoding="utf-8")

    page = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page.filters["scientific"] = words.scientific
    return page


def render_report(results: Mapping[str, Any]) -> str:
    """The report as HTML text, self-contained: no script, no font, no image from elsewhere."""
    require_packages()
    if results.get("kind") == EVALUATION:
        from nullbayes.report.own import render_own

        return render_own(results)
    from markupsafe import Markup

    from nullbayes.report.figures import all_figures

    page = environment()
    return page.get_template("template.html").render(
        results=results,
        dataset=results["dataset"],
        certificate=results["certificate"],
        certificate_rows=words.certificate_rows(results["certificate"]),
        certificate_details=words.certificate_rows(
            results["certificate"], words.CERTIFICATE_DETAILS
        ),
        headline=words.headline(results),
        nearest=words.nearest_words(results),
        tiles=words.tiles(results),
        table=words.table(results),
        figures={
            name: [Markup(svg) for svg in panels] for name, panels in all_figures(results).items()
        },
    )


def write_report(results: Mapping[str, Any], path: str | Path) -> Path:
    """Render and write, whole or not at all. Raises `StorageError` where the results lack what the page shows."""
    path = Path(path)
    try:
        page = render_report(results)
    except (NullBayesError, MemoryError):
        raise
    except Exception as error:  # whatever a drawing makes of values that no run ever wrote
        raise StorageError(
            f"these results lack, or hold as something else, what the report shows ({type(error).__name__}: {error}). "
            "They were changed, or written by another version: run the command that wrote them again."
        ) from error
    write_text(path, page)
    return path
