"""Report: one HTML page of runs that loads nothing from elsewhere.

    runs    the log, scores, pictures and settings of a run's folder
    page    the document and its sections; page.css is its style
    chart   lines as SVG

Reads what training and evaluation have written, and imports `evaluate` for the columns of scores; only the command line
imports this package.
"""

from fewstep.report.page import page, write_page
from fewstep.report.runs import Run, read_run

__all__ = ["Run", "page", "read_run", "write_page"]
