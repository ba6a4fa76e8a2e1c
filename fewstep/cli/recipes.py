"""`fewstep recipes`: the recipes that come with the package."""

import argparse
import sys
from pathlib import Path

from fewstep.cli.options import Commands
from fewstep.config.recipes import expected, load_recipe, markdown, recipe_names, shipped_file
from fewstep.errors import FewstepError


def list_recipes(args: argparse.Namespace) -> None:
    if args.markdown:
        print(markdown(), end="")
        return
    recipes = [load_recipe(name) for name in recipe_names()]
    rows = [("RECIPE", "METHOD", "TEACHER", "STATUS", "EXPECTED")]
    rows += [(r.name, r.method, r.teacher, r.info.status, expected(r.info)) for r in recipes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def show_recipe(args: argparse.Namespace) -> None:
    sys.stdout.write(shipped_file(args.name).read_text(encoding="utf-8"))


def copy_recipe(args: argparse.Namespace) -> None:
    path = args.file / f"{args.name.replace('/', '_')}.yaml" if args.file.is_dir() else args.file
    text = shipped_file(args.name).read_text(encoding="utf-8")
    if path.exists():
        raise FewstepError("file", f"{path}, which exists", "a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written to {path}")


def add_recipes(commands: Commands) -> None:
    c = commands.add_parser("recipes", help="list, show or copy the recipes that come with the package")
    c.add_argument("--markdown", action="store_true", help="the list as a table of Markdown")
    c.set_defaults(run=list_recipes)
    verbs = c.add_subparsers(metavar="list|show|copy", required=False)
    one = verbs.add_parser("list", help="a table of all recipes")
    one.add_argument("--markdown", action="store_true", help="the list as a table of Markdown")
    one.set_defaults(run=list_recipes)
    show = verbs.add_parser("show", help="print a recipe's file")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(run=show_recipe)
    copy = verbs.add_parser(
        "copy", help="copy a recipe's file, or accelerate/ddp or accelerate/two_machines, to be changed"
    )
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("file", type=Path, metavar="FILE", help="the copy, or a folder for it")
    copy.set_defaults(run=copy_recipe)
