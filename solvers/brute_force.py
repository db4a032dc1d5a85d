"""Every choice tried in turn: the reference that the other solvers are tested against.

Depends on the standard library only. The work grows as the product of the numbers of options, so
problems of more than ``MOST_CHOICES`` choices are refused.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from memfit.solvers.check import ProblemError
from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Problem,
    Solution,
    Status,
    describe,
    is_whole,
    peak_bytes,
    recompute_seconds,
    seconds_ceiling,
)

MOST_CHOICES = 2**20


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Fewest seconds within the budget; at the same seconds, lowest peak. Limits are not needed."""
    started = time.perf_counter()
    fewest = math.inf
    for choices in _all_choices(problem):
        seconds = recompute_seconds(problem, choices)
        if seconds < fewest and peak_bytes(problem, choices) <= problem.budget_bytes:
            fewest = seconds
    if fewest == math.inf:
        took = time.perf_counter() - started
        return Solution((), Status.INFEASIBLE, 0.0, 0, "brute_force", solve_seconds=took)
    # The lowest peak at these seconds needs no budget: a choice within it is among them.
    ceiling = seconds_ceiling(fewest)
    best = min(
        (choices for choices in _all_choices(problem) if _within(problem, choices, ceiling)),
        key=lambda choices: (peak_bytes(problem, choices), recompute_seconds(problem, choices)),
    )
    took = time.perf_counter() - started
    return describe(
        problem, best, Status.OPTIMAL, "brute_force", bound_seconds=fewest, solve_seconds=took
    )


def minimise_peak(problem: Problem) -> Solution:
    """Lowest peak of all choices, whatever the budget; at the same peak, fewest seconds."""
    started = time.perf_counter()
    lowest = min((peak_bytes(problem, choices) for choices in _all_choices(problem)), default=0)
    solution = solve(replace(problem, budget_bytes=lowest))
    return replace(solution, solve_seconds=time.perf_counter() - started)


def _within(problem: Problem, choices: tuple[int, ...], ceiling: float) -> bool:
    return recompute_seconds(problem, choices) <= ceiling


def _all_choices(problem: Problem) -> Iterator[tuple[int, ...]]:
    counts = [len(region.options) for region in problem.regions]
    total = math.prod(counts)
    if total > MOST_CHOICES:
        raise ProblemError(
            f"brute force tries at most {MOST_CHOICES} choices, the problem has {total}; "
            "use the solver auto"
        )
    return (c for c in product(*map(range, counts)) if is_whole(problem, c))
