"""The trade-off of memory and time: what a step costs at every peak that it can be planned into.

One preparation, many solves. Depends on the preparation and on the solvers.
"""

from dataclasses import dataclass

from memfit.planner.errors import InfeasibleBudget
from memfit.planner.preparing import Prepared, Progress
from memfit.planner.solving import Outcome, Task
from memfit.solvers import SOLVERS

PLAN = "plan"
# What people do by hand, in the order of what it costs.
BY_HAND = ("none", "keep_attention", "every_4", "every_3", "every_2", "full")


@dataclass(frozen=True, slots=True)
class Point:
    """What a step needs and takes when it is planned, or checkpointed by hand."""

    name: str
    """``plan``, or the baseline: ``none``, ``full``, ``every_2``, ..."""
    budget_bytes: int
    """The smallest that the point keeps; for a plan, the one that it was made for."""
    peak_bytes: int
    step_seconds: float
    overhead: float
    """Share of the unplanned step's seconds that is recomputed."""


def find_curve(
    prepared: Prepared, points: int = 20, progress: Progress | None = None
) -> tuple[Point, ...]:
    """Plans for budgets from the smallest that has one to what the unplanned step needs.

    The budgets are evenly spread; of a larger one the plan is never slower. After them come the
    baselines. ``points`` is 2 at least.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a curve has 2 at least")
    say = progress or (lambda _: None)
    task = prepared.task
    none = task.simulate(SOLVERS["none"](task.problem, task.limits))
    most = none.timeline.peak_bytes + task.margin_bytes
    say("solving for the smallest budget")
    least = min(smallest_budget(task), most)
    found: list[Point] = []
    best: Outcome | None = None
    for number in range(points):
        budget = least + (most - least) * number // (points - 1)
        say(f"solving for point {number + 1} of {points}")
        outcome = task.within(budget).solve("auto")
        # Solvers stop within a gap, and what fitted a smaller budget fits this one.
        if best is None or outcome.solution.recompute_seconds < best.solution.recompute_seconds:
            best = outcome
        found.append(_point(PLAN, budget, best, task))
    by_hand = ((name, task.simulate(SOLVERS[name](task.problem, task.limits))) for name in BY_HAND)
    for name, outcome in by_hand:
        needs = outcome.timeline.peak_bytes + task.margin_bytes
        found.append(_point(name, needs, outcome, task))
    return tuple(found)


def smallest_budget(task: Task) -> int:
    """Bytes of the smallest budget that has a plan."""
    try:
        task.within(1).solve("auto")
    except InfeasibleBudget as error:
        return error.minimum_bytes
    return 1


def _point(name: str, budget_bytes: int, outcome: Outcome, task: Task) -> Point:
    seconds, again = task.step.seconds, outcome.solution.recompute_seconds
    return Point(
        name=name,
        budget_bytes=budget_bytes,
        peak_bytes=outcome.timeline.peak_bytes,
        step_seconds=seconds + again,
        overhead=again / seconds if seconds else 0.0,
    )
