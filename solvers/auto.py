"""Picks the solver that suits a problem, and says which and why.

Runs of identical regions are counted, other problems enumerated; without an integer programming
solver, or when one ends without a choice, the greedy steps answer. Depends on the other solvers.
"""

from collections.abc import Callable
from dataclasses import replace

from memfit.solvers import count_ilp, flat_ilp, greedy
from memfit.solvers._compat import NoSolver
from memfit.solvers.problem import DEFAULT_LIMITS, Limits, Problem, Solution, Solver, Status
from memfit.solvers.runs import find_runs

NAME = "auto"


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """What the picked solver finds, signed with its name; ``note`` says why it was picked."""
    picked, why = _pick(problem)
    try:
        solution = picked(problem, limits)
    except NoSolver as missing:
        why = f"no integer program can be solved: {missing}"
    else:
        if solution.status is not Status.UNSOLVED:
            return replace(solution, note="; ".join(filter(None, (why, solution.note))))
        why = f"{solution.solver} found no choice in {limits.seconds:g} s"
    return replace(greedy.solve(problem, limits), note=why)


def minimise_peak(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Lowest peak of all choices, whatever the budget, by the integer program that suits."""
    find: Callable[[Problem, Limits], Solution] = flat_ilp.minimise_peak
    if _longest_run(problem) > 1:
        find = count_ilp.minimise_peak
    return find(problem, limits)


def _pick(problem: Problem) -> tuple[Solver, str]:
    longest = _longest_run(problem)
    if longest > 1:
        return count_ilp.solve, f"{longest} neighbouring regions are identical, and so are counted"
    return flat_ilp.solve, "no neighbouring regions are identical enough to be counted"


def _longest_run(problem: Problem) -> int:
    return max((run.length for run in find_runs(problem)), default=0)
