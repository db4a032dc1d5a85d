"""``memfit fit``: the largest batch, or the longest sequence, that a budget holds.

Depends on the planner; torch and transformers are imported when the model is built.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from memfit.integrations.commands.arguments import (
    Commands,
    add_budget,
    add_debug,
    add_json,
    add_model,
    add_workload,
    build_model,
    check_budget,
    step_options,
    write_json,
)
from memfit.integrations.progress import Progress, hushed
from memfit.planner.budget import format_bytes
from memfit.planner.report import columns, format_seconds, percent, wrapped
from memfit.solvers.records import encode

if TYPE_CHECKING:
    from memfit.planner.fitting import Fit

SCHEMA = "memfit.fit/1"
# Lengths are looked at in steps of so many tokens.
TOKENS = 8

_EXAMPLES = """\
examples:
  memfit fit llama --budget 24GiB --sequence-length 2048 --dtype bfloat16 \\
      --device rtx4090
  memfit fit bert --budget 24GiB --batch-size 64 --optimizer adamw --device a10g

exit status: 0 done, 2 wrong usage or unreadable input, 3 not even the smallest
step fits (the message names the smallest budget that it fits).
"""


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "fit",
        help="find the largest batch or length that fits a budget",
        description="Finds the largest batch that one training step of MODEL can have within a\n"
        "budget or, given a batch but no length, the longest sequence: unplanned, with\n"
        f"a plan, and with full checkpointing. Lengths are multiples of {TOKENS}.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    add_model(parser)
    add_budget(parser)
    add_workload(parser)
    add_json(parser, "the answer")
    add_debug(parser)


def run(options: argparse.Namespace) -> None:
    """Searches, and prints what fits."""
    check_budget(options)
    by_length = options.batch_size is not None and options.sequence_length is None
    with Progress(quiet=False) as progress, hushed(options.debug):
        progress.begin(f"building {options.model}")
        fits, tokens, budget_bytes = _search(options, by_length, progress)
    rows = [_answer(fit, options, by_length, tokens) for fit in fits]
    if options.json:
        write_json(SCHEMA, {"budget_bytes": budget_bytes, "ways": rows})
    else:
        sys.stdout.write(_table(rows, budget_bytes, by_length))


def _search(
    options: argparse.Namespace, by_length: bool, progress: Progress
) -> "tuple[tuple[Fit, ...], int, int]":
    """The fits, tokens of an example (of each step of the length), and the budget."""
    from memfit.planner import Batch
    from memfit.planner.batches import make_batch, most_tokens
    from memfit.planner.fitting import find_fits
    from memfit.planner.preparing import Prepared, prepare
    from memfit.planner.target import find_target, resolve_budget

    model = build_model(options)
    target = find_target(model, options.device)
    budget_bytes = resolve_budget(options.budget, target)

    def batch(size: int) -> Batch:
        if by_length:
            return Batch(options.batch_size, size * TOKENS)
        return Batch(size, options.sequence_length)

    def prepared(size: int, **more: str) -> Prepared:
        made = batch(size)
        what = f"{made.length} tokens" if by_length else f"a batch of {size}"
        progress.begin(f"trying {what}")
        return prepare(model, made, **(step_options(options) | more))

    tried = partial(prepared, costs="roofline")
    times = options.costs == "measured" or (options.costs == "auto" and target.is_present)
    limit = most_tokens(model) if by_length else None
    fits = find_fits(
        tried, budget_bytes, limit // TOKENS if limit else None, prepared if times else None
    )
    ids = make_batch(model, batch(1))[0].get("input_ids")
    return fits, ids.shape[-1] if ids is not None and ids.dim() > 1 else 0, budget_bytes


def _answer(
    fit: "Fit", options: argparse.Namespace, by_length: bool, tokens: int
) -> dict[str, Any]:
    """What is said of a way: examples and tokens of its step, and how many pass in a second."""
    examples = (options.batch_size if fit.size else 0) if by_length else fit.size
    length = (fit.size if by_length else 1) * tokens
    seconds = fit.step_seconds
    said: dict[str, Any] = encode(fit)
    return said | {
        "batch_size": examples,
        "sequence_length": length,
        "samples_per_second": examples / seconds if seconds else 0.0,
        "tokens_per_second": examples * length / seconds if seconds else 0.0,
    }


def _table(rows: Sequence[dict[str, Any]], budget_bytes: int, by_length: bool) -> str:
    what = "length" if by_length else "batch"
    head = ("", what, "peak", "overhead", "step", "samples/s", "tokens/s")
    cells = [head]
    for row in rows:
        if not row["size"]:
            cells.append((row["way"], "none", "-", "-", "-", "-", "-"))
            continue
        size = row["sequence_length"] if by_length else row["batch_size"]
        cells.append(
            (
                row["way"],
                f"{size}{'+' if row['is_limit'] else ''}",
                format_bytes(row["peak_bytes"]),
                percent(row["overhead"]),
                format_seconds(row["step_seconds"]),
                f"{row['samples_per_second']:.4g}",
                f"{row['tokens_per_second']:,.0f}" if row["sequence_length"] else "-",
            )
        )
    lines = [f"the largest {what} within {format_bytes(budget_bytes)}", "", *columns(cells)]
    if any(row["is_limit"] for row in rows):
        lines.append(wrapped("+ ", "the model takes no longer ones; more memory is left"))
    return "\n".join(lines) + "\n"
