"""From results to one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nullbayes.errors import InputError, MissingExtraError
from nullbayes.report import words
from nullbayes.report.writing import write_text

SCHEMA = 1
_NEEDED = (
    "dataset",
    "methods",
    "certificate",
    "prior_path",
    "curves",
    "regression",
    "settings",
    "environment",
)


def require_packages() -> None:
    """Stop now, with the line that mends it, if a package that draws the report is missing."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"The report needs {' and '.join(missing)}: pip install 'nullbayes[report]'."
        )


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a ``results.json`` that the demonstration wrote."""
    path = Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not whole JSON ({error}). Run `nullbayes demo` again."
        ) from error
    missing = [key for key in _NEEDED if not isinstance(results, dict) or key not in results]
    if missing:
        raise InputError(
            f"{path} is not a results file of `nullbayes demo`: it lacks {', '.join(missing)}."
        )
    if results.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has layout {results.get('schema')!r}, this version reads {SCHEMA}: run `nullbayes demo` again."
        )
    return results


def render_report(results: Mapping[str, Any]) -> str:
    """The report as HTML text, self-contained: no script, no font, no image from elsewhere."""
    require_packages()
    import jinja2
    from markupsafe import Markup

    from nullbayes.report.figures import all_figures

    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page.filters["scientific"] = words.scientific
    template = files("nullbayes.report").joinpath("template.html").read_text(encoding="utf-8")
    return page.from_string(template).render(
        results=results,
        dataset=results["dataset"],
        certificate=results["certificate"],
        certificate_rows=words.certificate_rows(results["certificate"]),
        certificate_details=words.certificate_rows(
            results["certificate"], words.CERTIFICATE_DETAILS
        ),
        headline=words.headline(results),
        tiles=words.tiles(results),
        table=words.table(results),
        figures={
            name: [Markup(svg) for svg in panels] for name, panels in all_figures(results).items()
        },
    )


def write_report(results: Mapping[str, Any], path: str | Path) -> Path:
    """Render and write, whole or not at all."""
    path = Path(path)
    write_text(path, render_report(results))
    return path
