"""``memfit show``: shows a plan as a table. Depends on the plan document alone."""

import argparse
import sys
from pathlib import Path

from memfit.integrations.commands.arguments import Commands, add_debug
from memfit.planner.document import Plan
from memfit.planner.report import format_plan


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "show",
        help="show a plan as a table",
        description="Prints the table of a plan that `memfit plan` wrote.",
        epilog="examples:\n  memfit show plan.json\n",
    )
    parser.set_defaults(run=run)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan file")
    add_debug(parser)


def run(options: argparse.Namespace) -> None:
    """Prints the table."""
    sys.stdout.write(format_plan(Plan.load(options.plan)))
