"""Greedy: from keeping everything, the cheapest step down at the peak, until the budget holds.

Each step changes the option of one region where that frees most at the highest moment for the
seconds it adds; at the end whatever turned out not to be needed is taken back, the dearest first.
Needs no integer program and no time, and proves nothing. Depends on the records alone.
"""

import time
from collections.abc import Iterator

from memfit.solvers.baselines import none
from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Problem,
    Solution,
    Status,
    describe,
    loads,
    peak_bytes,
    recompute_seconds,
)

NAME = "greedy"


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """A choice within the budget, if the steps lead to one."""
    started = time.perf_counter()
    if not all(region.options for region in problem.regions):
        return Solution((), Status.INFEASIBLE, 0.0, 0, NAME)
    choices = list(none(problem).choices)
    while peak_bytes(problem, choices) > problem.budget_bytes:
        step = step_down(problem, choices)
        if step is None:
            break
        choices[step[0]] = step[1]
    else:
        _take_back(problem, choices)
    fits = peak_bytes(problem, choices) <= problem.budget_bytes
    status = Status.FEASIBLE if fits else Status.INFEASIBLE
    if fits and not recompute_seconds(problem, choices):
        status = Status.OPTIMAL  # nothing recomputes for less than zero seconds
    took = time.perf_counter() - started
    return describe(problem, choices, status, NAME, solve_seconds=took)


def step_down(problem: Problem, choices: list[int]) -> tuple[int, int] | None:
    """The region and the option that free the highest moment at the lowest price; None if none."""
    alive = loads(problem, choices)
    highest = max(range(len(alive)), key=lambda index: alive[index])
    changes = _changes(problem, choices, highest)
    cheapest_first = sorted((seconds / freed, -freed, r, o) for r, o, freed, seconds in changes)
    for _, _, r, o in cheapest_first:
        if _is_lower(problem, choices, r, o, alive):
            return r, o
    return None


def _changes(
    problem: Problem, choices: list[int], index: int
) -> Iterator[tuple[int, int, int, float]]:
    """Region, option, bytes freed at a moment, seconds added, of the changes that free any."""
    moment = problem.moments[index]
    for r, region in enumerate(problem.regions):
        if r >= moment.stored and r != moment.region:
            continue
        now = region.options[choices[r]]
        for o, option in enumerate(region.options):
            freed = 0
            if r < moment.stored:
                freed += now.stored_bytes - option.stored_bytes
            if r == moment.region:
                freed += now.work_bytes(moment.phase) - option.work_bytes(moment.phase)
            if freed > 0:
                yield r, o, freed, option.recompute_seconds - now.recompute_seconds


def _is_lower(problem: Problem, choices: list[int], r: int, o: int, alive: tuple[int, ...]) -> bool:
    """Whether a change lowers the peak, or makes it rarer: then the steps come to an end."""
    changed = [*choices]
    changed[r] = o
    after, peak = loads(problem, changed), max(alive)
    return (max(after), after.count(peak)) < (peak, alive.count(peak))


def _take_back(problem: Problem, choices: list[int]) -> None:
    """Cheaper options where the budget holds with them."""
    dearest = sorted(
        range(len(choices)),
        key=lambda r: -problem.regions[r].options[choices[r]].recompute_seconds,
    )
    for r in dearest:
        options, now = problem.regions[r].options, choices[r]
        for o in sorted(range(len(options)), key=lambda o: options[o].recompute_seconds):
            if options[o].recompute_seconds >= options[now].recompute_seconds:
                break
            choices[r] = o
            if peak_bytes(problem, choices) <= problem.budget_bytes:
                break
            choices[r] = now
