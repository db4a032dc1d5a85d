"""Picks the solver that suits a problem, and says which and why.

Long runs of identical regions are counted. Of other problems, of layers that alternate say, the
nested program proves a choice in about a second, or they are enumerated. Where there are segments,
the nested program may do better; it also answers where no integer program can be solved. When a
program ends without a choice, the greedy steps answer. Depends on the other solvers.
"""

from collections.abc import Callable
from dataclasses import replace

from memfit.solvers import count_ilp, flat_ilp, greedy, nested_dp
from memfit.solvers._compat import NoSolver
from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Problem,
    Solution,
    Solver,
    Status,
    seconds_ceiling,
)
from memfit.solvers.runs import find_runs

NAME = "auto"
LONG_RUN = 0.25
"""Share of the regions that are in a run from which on it is counted at once."""


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """What the picked solver finds, signed with its name; ``note`` says why it was picked."""
    flat = _solve_flat(problem.flat(), limits)
    if not problem.segments:
        return flat
    nested = nested_dp.solve(problem, limits)
    if not flat.choices:
        return replace(nested, note="nothing fits as long as each region holds its input")
    if nested.choices and seconds_ceiling(nested.recompute_seconds) < flat.recompute_seconds:
        return replace(nested, note=f"faster than what {flat.solver} finds without segments")
    return flat


def _solve_flat(problem: Problem, limits: Limits) -> Solution:
    longest = _longest_run(problem)
    if longest < max(2, LONG_RUN * len(problem.regions)):
        proved = nested_dp.prove(problem, limits)
        if proved is not None:
            return replace(proved, note="few choices are as good as the bound, and were all tried")
    picked, why = _pick(longest)
    try:
        solution = picked(problem, limits)
    except NoSolver as missing:
        why = f"no integer program can be solved: {missing}"
        return replace(nested_dp.solve(problem, limits), note=why)
    if solution.status is not Status.UNSOLVED:
        return replace(solution, note="; ".join(filter(None, (why, solution.note))))
    why = f"{solution.solver} found no choice in {limits.seconds:g} s"
    return replace(greedy.solve(problem, limits), note=why)


def minimise_peak(
    problem: Problem, limits: Limits = DEFAULT_LIMITS, *, any_seconds: bool = False
) -> Solution:
    """Lowest peak of all choices, whatever the budget, by the solver that suits.

    With ``any_seconds`` it may be slower than others of that peak, but is found sooner.
    """
    flat = _minimise_flat(problem.flat(), limits)
    if not problem.segments:
        return flat
    nested = nested_dp.minimise_peak(problem, limits, any_seconds=any_seconds)
    found = [solution for solution in (flat, nested) if solution.choices]
    return min(found, key=lambda solution: solution.peak_bytes, default=nested)


def _minimise_flat(problem: Problem, limits: Limits) -> Solution:
    find: Callable[[Problem, Limits], Solution] = flat_ilp.minimise_peak
    if _longest_run(problem) > 1:
        find = count_ilp.minimise_peak
    try:
        return find(problem, limits)
    except NoSolver:
        return nested_dp.minimise_peak(problem, limits)


def _pick(longest: int) -> tuple[Solver, str]:
    if longest > 1:
        return count_ilp.solve, f"{longest} neighbouring regions are identical, and so are counted"
    return flat_ilp.solve, "no neighbouring regions are identical enough to be counted"


def _longest_run(problem: Problem) -> int:
    return max((run.length for run in find_runs(problem)), default=0)
