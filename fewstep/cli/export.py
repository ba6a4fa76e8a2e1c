"""`fewstep export`: a run's newest checkpoint, or its best weights, exported again."""

import argparse
from pathlib import Path

from fewstep.cli.options import Commands


def export(args: argparse.Namespace) -> None:
    from fewstep.training.run import export_run

    export_run(args.run_folder)


def add_export(commands: Commands) -> None:
    c = commands.add_parser("export", help="export again from a run's folder, such as after a failure of the last step")
    c.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run, with config.yaml and checkpoints")
    c.set_defaults(run=export)
