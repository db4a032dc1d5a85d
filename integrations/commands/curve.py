"""``memfit curve``: the whole trade-off of memory and time, as a table, CSV, JSON or a figure.

Depends on the planner; torch and transformers are imported when the model is built.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.integrations.commands.arguments import (
    Commands,
    add_debug,
    add_json,
    add_model,
    add_workload,
    build_model,
    check_writable,
    make_batch,
    step_options,
    whole_number,
    write_json,
)
from memfit.integrations.curve import draw_curve
from memfit.integrations.pictures import check_picture
from memfit.integrations.progress import Progress, hushed
from memfit.planner.budget import format_bytes
from memfit.planner.report import columns, format_seconds, percent
from memfit.solvers.records import encode, write

if TYPE_CHECKING:
    from memfit.planner.curve import Point

SCHEMA = "memfit.curve/1"

_EXAMPLES = """\
examples:
  memfit curve bert --batch-size 16 --device a10g
  memfit curve llama --dtype bfloat16 --optimizer adamw --device h100 \\
      --points 12 --csv curve.csv --plot curve.png
"""


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "curve",
        help="show what a step costs at every peak",
        description="Plans one training step of MODEL for budgets from the smallest that has a\n"
        "plan to what it needs unplanned, beside what can be had by hand.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    add_model(parser)
    add_workload(parser)
    parser.add_argument(
        "--points",
        type=partial(whole_number, least=2),
        default=20,
        metavar="N",
        help="budgets to plan for (20)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the points here as well")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw them into an .html page, or a .png or .svg (pip install 'memfit[plot]')",
    )
    add_json(parser, "the points")
    add_debug(parser)


def run(options: argparse.Namespace) -> None:
    """Finds the points, and writes them in every form that was asked for."""
    for path in (options.csv, options.plot):
        if path is not None:
            check_writable(path)
    if options.plot is not None:
        check_picture(options.plot)
    with Progress(quiet=False) as progress, hushed(options.debug):
        progress.begin(f"building {options.model}")
        from memfit.planner.curve import find_curve
        from memfit.planner.preparing import prepare

        model = build_model(options)
        prepared = prepare(
            model, make_batch(options), **step_options(options), progress=progress.begin
        )
        points = find_curve(prepared, options.points, progress.begin)
    if options.csv is not None:
        write(options.csv, _csv(points))
    if options.plot is not None:
        draw_curve(points, prepared.model.class_, options.plot)
    if options.json:
        write_json(SCHEMA, {"points": [encode(point) for point in points]})
    else:
        sys.stdout.write(_table(points))


def _csv(points: "Sequence[Point]") -> str:
    text = io.StringIO()
    rows = [encode(point) for point in points]
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(points: "Sequence[Point]") -> str:
    head = ("", "budget", "peak", "overhead", "step")
    cells = [
        (
            point.name,
            format_bytes(point.budget_bytes),
            format_bytes(point.peak_bytes),
            percent(point.overhead),
            format_seconds(point.step_seconds),
        )
        for point in points
    ]
    return "\n".join(columns([head, *cells])) + "\n"
