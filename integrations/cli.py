"""The command line: ``memfit plan``, ``memfit solve`` and ``memfit show``.

A plan is JSON on stdout or in a file; what is meant for people (the table, progress, errors) goes
to stderr, so that stdout can be piped. ``show``, ``solve`` and every ``--help`` work without torch
and transformers, which are imported when a model is built. Depends on the planner.
"""

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from memfit.integrations.progress import Progress, hushed
from memfit.planner.budget import parse_budget
from memfit.planner.devices import DEVICES
from memfit.planner.document import Plan
from memfit.planner.errors import InfeasibleBudget, MemfitError, SolverError
from memfit.planner.report import format_plan
from memfit.solvers import (
    AUTO,
    NESTED,
    SOLVERS,
    Limits,
    NoSolver,
    ProblemError,
    Status,
    load_problem,
    minimise_peak,
    solution_to_json,
)

DONE, UNUSABLE, INFEASIBLE = 0, 2, 3
# What a shell reports for a process that SIGINT or SIGPIPE ended.
INTERRUPTED, PIPE_CLOSED = 130, 141

_EXAMPLES = """\
examples:
  memfit plan bert --budget 2GiB --batch-size 8 --sequence-length 128 \\
      --device cpu -o plan.json
  memfit plan ./my-model --budget 24GiB --batch-size 8 --sequence-length 2048 \\
      --dtype bfloat16 --optimizer adamw --device h100 > plan.json
  memfit show plan.json
  memfit solve problem.json --solver greedy --budget 20GiB
"""
_SOLVE_EXAMPLES = """\
examples:
  memfit plan bert --budget 2GiB --device cpu --save-problem bert.json
  memfit solve bert.json --budget 1.5GiB --solver flat_ilp

exit status: 0 done, 2 wrong usage or unreadable input, 3 the solver has no
choice within the budget (the message names the smallest budget that has one).
"""
_PLAN_EXAMPLES = """\
examples:
  memfit plan llama --budget 76GiB --batch-size 2 --dtype bfloat16 --device h100
  memfit plan path/to/config.json --budget auto --optimizer adamw -o plan.json

exit status: 0 done, 2 wrong usage or unreadable input, 3 no plan keeps the
budget (the message names the smallest budget that has one).
"""


class UsageError(MemfitError, ValueError):
    """The command line cannot be understood or cannot be done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors are one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more as it ends, and must not find the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (MemfitError, OSError) as error:
        if "--debug" in words:
            traceback.print_exc()
        print(f"memfit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return INFEASIBLE if isinstance(error, InfeasibleBudget) else UNUSABLE


def _run(words: Sequence[str]) -> int:
    parser = _make_parser()
    options = parser.parse_args(_spelled(words))
    if options.command is None:
        parser.print_help(sys.stderr)
        return UNUSABLE
    options.run(options)
    sys.stdout.flush()  # a closed pipe shows here, not after the exit status is settled
    return DONE


# -- commands ------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> None:
    for path in (options.output, options.save_problem):
        if path is not None:
            _check_writable(path)
    if options.output is not None and options.output == options.save_problem:
        raise UsageError(f"{options.output} is named twice; the problem needs a file of its own")
    if options.budget != "auto":
        parse_budget(options.budget)  # refused before a model is built, not after
    progress = Progress(options.quiet)
    try:
        with progress, hushed(options.debug):
            plan = _make_plan(options, progress.begin)
    finally:
        if options.timings:
            sys.stderr.write(progress.timings())
    if not options.quiet:
        sys.stderr.write(format_plan(plan))
    if options.output is not None:
        plan.save(options.output)
    else:
        sys.stdout.write(plan.to_json())


def _make_plan(options: argparse.Namespace, progress: Callable[[str], None]) -> Plan:
    progress(f"building {options.model}")
    from memfit.integrations.models import build_model
    from memfit.planner import Batch, plan

    batch = None
    if options.batch_size is not None or options.sequence_length is not None:
        size = 1 if options.batch_size is None else options.batch_size
        batch = Batch(size=size, length=options.sequence_length)
    model = build_model(
        options.model,
        task=options.task,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    return plan(
        model,
        options.budget,
        batch,
        optimizer=options.optimizer,
        device=options.device,
        solver=options.solver,
        costs=options.costs,
        selective=options.selective,
        keep_outputs=options.keep_outputs,
        keep_gradients=options.keep_gradients,
        max_grad_norm=options.max_grad_norm,
        autocast=options.autocast,
        gap=options.gap,
        time_limit_seconds=options.time_limit,
        save_problem=options.save_problem,
        bound=options.bound,
        progress=progress,
    )


def _solve(options: argparse.Namespace) -> None:
    budget = None if options.budget is None else parse_budget(options.budget)
    try:
        problem = load_problem(options.problem, budget)
        limits = Limits(options.gap, options.time_limit)
        solution = SOLVERS[options.solver](problem, limits)
        if solution.status is Status.INFEASIBLE:
            offered = problem if options.solver in (AUTO, *NESTED) else problem.flat()
            least = solution.peak_bytes or minimise_peak(offered, limits).peak_bytes
            raise InfeasibleBudget(
                f"{solution.solver} has no choice within {problem.budget_bytes} bytes; the "
                f"smallest budget that has one is {least} bytes: pass --budget {least}",
                least,
            )
    except (NoSolver, ProblemError) as error:
        raise SolverError(str(error)) from error
    sys.stdout.write(solution_to_json(problem, solution))


def _show(options: argparse.Namespace) -> None:
    sys.stdout.write(format_plan(Plan.load(options.plan)))


def _check_writable(path: Path) -> None:
    """Refuses what a plan cannot be written to, before the work begins."""
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no directory {path.parent}; make it first")
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {path}: it is not a file; name one, such as plan.json")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: no permission to write in {path.parent}")


# -- arguments -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _spelled(words: Sequence[str]) -> list[str]:
    """``words`` as the parser knows them: ``--batch_size`` is ``--batch-size``.

    A number below zero is tied to its flag, because ``-5GiB`` alone reads as a flag of its own.
    """
    spelled: list[str] = []
    for word in words:
        if re.match(r"-\.?\d", word) and spelled and spelled[-1].startswith("--"):
            spelled[-1] += f"={word}"
        elif word.startswith("--"):
            flag, *value = word.split("=", 1)
            spelled.append("=".join([flag.replace("_", "-"), *value]))
        else:
            spelled.append(word)
    return spelled


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="memfit",
        description="Plans a training step into a memory budget in bytes: which activations to\n"
        "keep, and which to recompute.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"memfit {version('memfit')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_plan(commands)
    _add_solve(commands)
    _add_show(commands)
    return parser


def _add_plan(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "plan",
        help="plan a model's training step into a budget",
        description="Plans one training step of MODEL into a budget. No weights are loaded,\n"
        "and no GPU is needed. The plan is JSON on stdout, its table goes to stderr.",
        epilog=_PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_plan)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="local directory, config.json, model type such as bert or llama, or hub id",
    )
    parser.add_argument(
        "--budget",
        required=True,
        metavar="BYTES",
        help="peak of all device memory in a step: 24GiB (2**30 each), 24GB (10**9), bytes, or "
        "auto for what the GPU has free",
    )
    _add_workload(parser)
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
    _add_debug(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the training step")
    group.add_argument("--batch-size", type=int, metavar="N", help="examples in a batch (1)")
    group.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens in an example (from the config)"
    )
    group.add_argument(
        "--dtype", metavar="NAME", help="dtype of the weights, such as bfloat16 (the config's own)"
    )
    group.add_argument(
        "--optimizer", metavar="NAME", help="adamw, sgd, ... (none: forward and backward only)"
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help=f"cuda (the GPU of this machine) or one of {', '.join(DEVICES)}",
    )
    group.add_argument(
        "--task", metavar="NAME", help="causal-lm, masked-lm, ... (what the config is made for)"
    )
    group.add_argument(
        "--keep-outputs",
        action="store_true",
        help="plan for a loop that holds the model's outputs during the backward",
    )
    group.add_argument(
        "--keep-gradients",
        action="store_true",
        help="plan for a step that adds to the gradients of earlier ones (accumulation)",
    )
    group.add_argument(
        "--max-grad-norm",
        type=float,
        metavar="NORM",
        help="gradients are clipped to this norm before the optimizer step",
    )
    group.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        help="the forward runs under torch.autocast with this dtype",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with the config"
    )


def _add_solving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("solving")
    group.add_argument(
        "--costs",
        choices=("auto", "measured", "roofline"),
        default="auto",
        help="seconds from timing every distinct op on the device, or from the device table; auto: "
        "measured if the device is here",
    )
    group.add_argument(
        "--selective",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute op by op within regions too (default), or regions whole only",
    )
    group.add_argument(
        "--bound",
        action="store_true",
        help="say how far the plan is at most from the best one of its regions and, for a step of "
        "few ops, from the best schedule of any kind",
    )
    _add_solver(group)


def _add_solver(group: "argparse._ArgumentGroup | _Parser") -> None:
    group.add_argument(
        "--solver",
        choices=tuple(SOLVERS),
        default="auto",
        metavar="NAME",
        help=f"one of {', '.join(SOLVERS)} (auto)",
    )
    group.add_argument(
        "--gap",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="stop once the plan is proved to be this close to the best (0)",
    )
    group.add_argument(
        "--time-limit",
        type=_seconds,
        default=20.0,
        metavar="SECONDS",
        help="stop with the best plan found after this long (20)",
    )


def _add_solve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "solve",
        help="solve a problem that was saved",
        description="Solves a problem that `memfit plan --save-problem` wrote, without the model.\n"
        "The solution is JSON on stdout.",
        epilog=_SOLVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_solve)
    parser.add_argument("problem", type=Path, metavar="PROBLEM", help="a problem file")
    parser.add_argument(
        "--budget", metavar="BYTES", help="24GiB, 24GB or bytes (the one that was planned for)"
    )
    _add_solver(parser)
    _add_debug(parser)


def _add_show(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "show",
        help="show a plan as a table",
        description="Prints the table of a plan that `memfit plan` wrote.",
        epilog="examples:\n  memfit show plan.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_show)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan file")
    _add_debug(parser)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _share(text: str) -> float:
    return _number(text, lambda share: 0 <= share < 1, "a number from 0 to below 1")


def _seconds(text: str) -> float:
    return _number(text, lambda seconds: seconds > 0, "a number of seconds above 0")


def _number(text: str, allowed: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):  # no comparison is true of nan
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
