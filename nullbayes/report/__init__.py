"""The HTML report: one file, no request to anywhere, rendered from ``results.json`` alone."""

from .render import read_results, render_report, require_packages, write_report
from .words import headline

__all__ = ["headline", "read_results", "render_report", "require_packages", "write_report"]
