"""``memfit plan``: plans a model's training step into a budget.

Depends on the planner; torch and transformers are imported when the model is built.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from memfit.integrations.commands.arguments import (
    Commands,
    Parser,
    UsageError,
    add_budget,
    add_debug,
    add_model,
    add_solver,
    add_workload,
    build_model,
    check_budget,
    check_writable,
    make_batch,
    step_options,
    write_table,
)
from memfit.integrations.progress import Progress, hushed
from memfit.planner.document import Plan

_EXAMPLES = """\
examples:
  memfit plan llama --budget 76GiB --batch-size 2 --dtype bfloat16 --device h100
  memfit plan path/to/config.json --budget auto --optimizer adamw -o plan.json

exit status: 0 done, 2 wrong usage or unreadable input, 3 no plan keeps the
budget (the message names the smallest budget that has one).
"""


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "plan",
        help="plan a model's training step into a budget",
        description="Plans one training step of MODEL into a budget. No weights are loaded,\n"
        "and no GPU is needed. The plan is JSON on stdout, its table goes to stderr.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    add_model(parser)
    add_budget(parser)
    add_workload(parser)
    _add_solving(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the plan here, not to stdout"
    )
    parser.add_argument(
        "--save-problem",
        type=Path,
        metavar="FILE",
        help="write the solver's problem here, for `memfit solve`",
    )
    parser.add_argument("--quiet", action="store_true", help="no table and no progress on stderr")
    parser.add_argument(
        "--timings", action="store_true", help="say on stderr how long each part of the work took"
    )
    add_debug(parser)


def _add_solving(parser: Parser) -> None:
    group = parser.add_argument_group("solving")
    group.add_argument(
        "--bound",
        action="store_true",
        help="say how far the plan is at most from the best one of its regions and, for a step of "
        "few ops, from the best schedule of any kind",
    )
    add_solver(group)


def run(options: argparse.Namespace) -> None:
    """Makes the plan and writes it."""
    for path in (options.output, options.save_problem):
        if path is not None:
            check_writable(path)
    if options.output is not None and options.output == options.save_problem:
        raise UsageError(f"{options.output} is named twice; the problem needs a file of its own")
    check_budget(options)
    progress = Progress(options.quiet)
    try:
        with progress, hushed(options.debug):
            plan = _make_plan(options, progress.begin)
    finally:
        if options.timings:
            sys.stderr.write(progress.timings())
    if not options.quiet:
        write_table(plan, sys.stderr)
    if options.output is not None:
        plan.save(options.output)
    else:
        sys.stdout.write(plan.to_json())


def _make_plan(options: argparse.Namespace, progress: Callable[[str], None]) -> Plan:
    progress(f"building {options.model}")
    from memfit.planner import plan
    from memfit.planner.preparing import no_cycles

    with no_cycles():
        return plan(
            build_model(options),
            options.budget,
            make_batch(options),
            **step_options(options),
            solver=options.solver,
            gap=options.gap,
            time_limit_seconds=options.time_limit,
            save_problem=options.save_problem,
            bound=options.bound,
            progress=progress,
        )
