"""The HTML report: one file, no request to anywhere, rendered from ``results.json`` alone."""

from nullbayes.report.render import read_results, render_report, require_packages, write_report
from nullbayes.report.words import headline

__all__ = ["headline", "read_results", "render_report", "require_packages", "write_report"]
