"""``memfit show``: shows a plan as a table, or what is alive at its peak and over its step.

Depends on the plan document; matplotlib is imported for a figure.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from memfit.integrations.commands.arguments import (
    Commands,
    UsageError,
    add_debug,
    add_json,
    add_plan_file,
    check_writable,
    whole_number,
    write_table,
)
from memfit.integrations.pictures import check_picture
from memfit.integrations.timeline import draw_timeline
from memfit.planner.document import Plan
from memfit.planner.peak_report import format_peak

_EXAMPLES = """\
examples:
  memfit show plan.json
  memfit show plan.json --top 20
  memfit show plan.json --timeline step.html
"""


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "show",
        help="show a plan as a table, its peak, or its memory over the step",
        description="Prints the table of a plan that `memfit plan` wrote, or what the options\n"
        "ask for in its place.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    add_plan_file(parser)
    parser.add_argument(
        "--top",
        type=partial(whole_number, least=1),
        metavar="N",
        help="print the N largest tensors that are alive at the peak; those that are alike share "
        "a row",
    )
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="draw the bytes alive over the step into an .html page, or a .png or .svg figure "
        "(these with matplotlib: pip install 'memfit[plot]')",
    )
    add_json(parser, "the plan")
    add_debug(parser)


def run(options: argparse.Namespace) -> None:
    """Prints a table or the plan as this version of memfit reads it, draws a picture, or both."""
    if options.timeline is not None:
        check_picture(options.timeline)
        check_writable(options.timeline)
        if options.timeline == options.plan:
            raise UsageError(f"{options.plan} is the plan; the picture needs a file of its own")
    plan = Plan.load(options.plan)
    if options.timeline is not None:
        draw_timeline(plan, options.timeline)
    if options.json:
        sys.stdout.write(plan.to_json())
    elif options.top is not None:
        sys.stdout.write(format_peak(plan, options.top))
    elif options.timeline is None:
        write_table(plan, sys.stdout)
