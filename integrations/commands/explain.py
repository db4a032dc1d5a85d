"""``memfit explain``: says what a plan's decisions cost, and what another budget would do.

Depends on the plan document alone.
"""

import argparse
import sys

from memfit.integrations.commands.arguments import (
    Commands,
    add_debug,
    add_json,
    add_plan_file,
    write_json,
)
from memfit.planner.document import Plan
from memfit.planner.explaining import explain, format_explanation, format_regions, regions_named
from memfit.solvers.records import encode

SCHEMA = "memfit.explanation/1"

_EXAMPLES = """\
examples:
  memfit explain plan.json
  memfit explain plan.json model.layers.3
"""


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "explain",
        help="say what a plan's decisions cost, and what would help",
        description="Says what each decision of a plan frees and pays, what budgets around the\n"
        "plan's own would do, and what would help most; with REGION, all that the\n"
        "plan says of one region. The model is not needed.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    add_plan_file(parser)
    parser.add_argument("region", nargs="?", metavar="REGION", help="one, as `show` names it")
    add_json(parser, "the explanation")
    add_debug(parser)


def run(options: argparse.Namespace) -> None:
    """Prints the explanation."""
    plan = Plan.load(options.plan)
    if options.region is not None:
        regions = regions_named(plan, options.region)
        if options.json:
            write_json(SCHEMA, {"regions": encode(regions)})
        else:
            sys.stdout.write(format_regions(plan, regions))
        return
    explanation = explain(plan)
    if options.json:
        write_json(SCHEMA, encode(explanation))
    else:
        sys.stdout.write(format_explanation(plan, explanation))
