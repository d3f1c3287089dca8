"""The page about one's own model, from an evaluation's results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nullbayes.report import own_words as say
from nullbayes.report import words


def render_own(results: Mapping[str, Any]) -> str:
    """HTML text, self-contained. ``results``: what `Evaluation.as_dict` gives, with ``title`` where one was chosen."""
    from markupsafe import Markup

    from nullbayes.report.own_figures import own_figures
    from nullbayes.report.render import environment

    certificate = results["certificate"]
    drawn = own_figures(results)
    return str(
        environment()
        .get_template("own.html")
        .render(
            title=results.get("title") or results["settings"]["model"],
            headline=say.headline(results),
            tiles=say.tiles(results),
            table=say.comparison(results),
            detection=say.detection(results),
            thresholds=say.thresholds(results),
            thresholds_from=results["thresholds"],
            slices=say.parts(results, "slices"),
            classes=say.parts(results, "classes"),
            examples=_examples(results),
            certificate=certificate,
            certificate_rows=words.certificate_rows(certificate, say.certificate_fields(results)),
            certificate_details=words.certificate_rows(certificate, words.CERTIFICATE_DETAILS),
            audit=results.get("audit"),
            notes=results["notes"],
            main=results["main"],
            methods=results["methods"],
            settings=_settings(results["settings"]),
            data=results["data"],
            environment=results["environment"],
            figures={name: [Markup(svg) for svg in svgs] for name, svgs in drawn.items()},
        )
    )


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: words.scientific(v) if isinstance(v, float) else v for k, v in settings.items()}


def _examples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of inputs that are worth a look, those that hold any."""
    by = "confidence" if results["task"] == "classification" else "NLL"
    wrong = results.get("units", {}).get("test: wrong", by) == "confidence"
    known = {
        "test: novel": ("Most novel test inputs", "novelty"),
        "test: wrong": ("Most confidently wrong", "confidence")
        if wrong
        else ("Least expected targets", "NLL"),
    }
    out = []
    for name, entries in results["examples"].items():
        title, unit = known.get(name, (f"Most novel of “{name}”", "novelty"))
        if entries:
            out.append({"title": title, "unit": unit, "entries": entries})
    return out
