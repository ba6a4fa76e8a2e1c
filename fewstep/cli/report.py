"""`fewstep report`: runs as one HTML page."""

import argparse
from pathlib import Path

from fewstep.cli.options import Commands


def report(args: argparse.Namespace) -> None:
    from fewstep.report.page import write_page

    write_page(args.runs, args.output, title=args.title)
    print(f"written to {args.output}")


def add_report(commands: Commands) -> None:
    r = commands.add_parser("report", help="one HTML page of runs: curves, scores, samples, protocol; opens offline")
    r.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or an evaluation.json")
    r.add_argument("--output", type=Path, default=Path("report.html"), help="(default: report.html)")
    r.add_argument("--title", help="(default: the runs' names)")
    r.set_defaults(run=report)
