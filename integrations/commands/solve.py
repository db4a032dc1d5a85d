"""``memfit solve``: solves a problem that was saved. Depends on the solvers."""

import argparse
import sys
from pathlib import Path

from memfit.integrations.commands.arguments import Commands, add_debug, add_solver
from memfit.planner.budget import parse_budget
from memfit.planner.errors import InfeasibleBudget, SolverError
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

_EXAMPLES = """\
examples:
  memfit plan bert --budget 2GiB --device cpu --save-problem bert.json
  memfit solve bert.json --budget 1.5GiB --solver flat_ilp

exit status: 0 done, 2 wrong usage or unreadable input, 3 the solver has no
choice within the budget (the message names the smallest budget that has one).
"""


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "solve",
        help="solve a problem that was saved",
        description="Solves a problem that `memfit plan --save-problem` wrote, without the model.\n"
        "The solution is JSON on stdout.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("problem", type=Path, metavar="PROBLEM", help="a problem file")
    parser.add_argument(
        "--budget", metavar="BYTES", help="24GiB, 24GB or bytes (the one that was planned for)"
    )
    add_solver(parser)
    add_debug(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the solution to stdout."""
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
