"""``memfit check``: says whether a plan still holds for the model as it is now.

Depends on the planner; torch and transformers are imported when the model is built.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from memfit.integrations.commands.arguments import (
    DONE,
    INFEASIBLE,
    Commands,
    UsageError,
    add_class,
    add_debug,
    add_json,
    add_model,
    add_plan_file,
    build_model,
    write_json,
)
from memfit.integrations.progress import Progress, hushed
from memfit.integrations.terminal import red
from memfit.planner.budget import exact_bytes, format_bytes, parse_budget
from memfit.planner.document import Plan
from memfit.planner.report import percent, wrapped
from memfit.solvers.records import encode

if TYPE_CHECKING:
    from memfit.planner.rechecking import Recheck

SCHEMA = "memfit.check/1"

_EXAMPLES = """\
examples:
  memfit check plan.json ./my-model
  memfit check plan.json llama --max-peak 76GiB --json

exit status: 0 the plan holds, 2 wrong usage, unreadable input or another model
than the plan's, 3 the peak is above the plan's budget or --max-peak.
"""


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "check",
        help="say whether a plan still holds for a model",
        description="Captures the plan's training step anew with MODEL as it is now, and says\n"
        "what the plan's choice peaks at there. Nothing is solved.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    add_plan_file(parser)
    add_model(parser)
    add_class(parser, "the plan's")
    parser.add_argument(
        "--max-peak", metavar="BYTES", help="24GiB, 24GB or bytes: what the peak may be at most"
    )
    add_json(parser, "the verdict")
    add_debug(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the verdict; the exit status says it too."""
    limit = None if options.max_peak is None else parse_budget(options.max_peak)
    plan = Plan.load(options.plan)
    with Progress(quiet=False) as progress, hushed(options.debug):
        found = _recheck(options, plan, progress)
    reasons = _reasons(found, limit)
    if options.json:
        verdict = {"holds": not reasons, "reasons": reasons, "max_peak_bytes": limit}
        write_json(SCHEMA, verdict | encode(found))
    else:
        sys.stdout.write(_format(found, reasons))
    return INFEASIBLE if reasons else DONE


def _recheck(options: argparse.Namespace, plan: Plan, progress: Progress) -> "Recheck":
    if plan.model.class_.startswith("Peft") and options.lora is None:
        raise UsageError(
            f"{options.plan} is a plan of a model with adapters ({plan.model.class_}, "
            f"{plan.model.trainable_parameters:,} parameters are trained); pass --lora as when it "
            "was planned"
        )
    progress.begin(f"building {options.model}")
    from memfit.planner.rechecking import prepare_again, recheck

    model = build_model(options, dtype=plan.model.dtype, class_name=plan.model.class_)
    prepared = prepare_again(plan, model, progress.begin)
    progress.begin("simulating the plan")
    return recheck(plan, prepared)


def _reasons(found: "Recheck", limit: int | None) -> list[str]:
    """Why the plan does not hold."""
    reasons = []
    peak = f"the peak of {exact_bytes(found.peak_bytes)}"
    if not found.keeps_budget:
        free = found.margin_bytes
        margin = f", of which a plan leaves {format_bytes(free)} free" if free else ""
        budget = exact_bytes(found.budget_bytes)
        reasons.append(f"{peak} is above the plan's budget of {budget}{margin}")
    if limit is not None and found.peak_bytes > limit:
        reasons.append(f"{peak} is above --max-peak, {exact_bytes(limit)}")
    return reasons


def _format(found: "Recheck", reasons: list[str]) -> str:
    change = found.peak_bytes - found.planned_peak_bytes
    than = "the same to the byte"
    if change:
        word, share = "more" if change > 0 else "less", abs(change) / found.planned_peak_bytes
        than = f"now {format_bytes(abs(change))} ({percent(share)}) {word}"
    lines = [
        wrapped("peak    ", f"{format_bytes(found.peak_bytes)} in the {found.peak_at}"),
        f"plan    {format_bytes(found.planned_peak_bytes)}, {than}",
        f"budget  {format_bytes(found.budget_bytes)}",
        *(wrapped("note: ", note) for note in found.notes),
        "the plan holds" if not reasons else red("the plan does not hold:", sys.stdout),
        *(wrapped("- ", reason) for reason in reasons),
    ]
    return "\n".join(lines) + "\n"
