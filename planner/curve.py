"""The trade-off of memory and time: what a step costs at every peak that it can be planned into.

One preparation, many solves. Depends on the preparation and on the solvers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memfit.planner.errors import InfeasibleBudget
from memfit.planner.preparing import Prepared, Progress, no_cycles
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


@no_cycles()
def find_curve(
    prepared: Prepared, points: int = 20, progress: Progress | None = None
) -> tuple[Point, ...]:
    """Plans for budgets from the smallest that has one to what the unplanned step needs.

    The budgets are evenly spread; with a larger one the plan is never slower, with a smaller one
    its peak never higher. After them come the baselines. ``points`` is 2 at least.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a curve has 2 at least")
    say = progress or (lambda _: None)
    task = prepared.task
    none = task.simulate(SOLVERS["none"](task.problem, task.limits))
    most = none.timeline.peak_bytes + task.margin_bytes
    say("solving for the smallest budget")
    least = min(smallest_budget(task), most)
    budgets = [least + (most - least) * number // (points - 1) for number in range(points)]
    outcomes = []
    for number, budget in enumerate(budgets, start=1):
        say(f"solving for point {number} of {points}")
        outcomes.append(task.within(budget).solve("auto"))
    plans = (_point(PLAN, budget, _best(outcomes, budget, task), task) for budget in budgets)
    return (*plans, *_by_hand(task))


def smallest_budget(task: Task) -> int:
    """Bytes of the smallest budget that has a plan."""
    try:
        task.within(1).solve("auto")
    except InfeasibleBudget as error:
        return error.minimum_bytes
    return 1


def _best(outcomes: Sequence[Outcome], budget_bytes: int, task: Task) -> Outcome:
    """The fastest that fits, of all budgets' plans: solvers stop within a gap, each at another."""
    fitting = (o for o in outcomes if o.timeline.peak_bytes + task.margin_bytes <= budget_bytes)
    return min(fitting, key=lambda o: (o.solution.recompute_seconds, o.timeline.peak_bytes))


def _by_hand(task: Task) -> Iterator[Point]:
    """The baselines."""
    for name in BY_HAND:
        outcome = task.simulate(SOLVERS[name](task.problem, task.limits))
        needs = outcome.timeline.peak_bytes + task.margin_bytes
        yield _point(name, needs, outcome, task)


def _point(name: str, budget_bytes: int, outcome: Outcome, task: Task) -> Point:
    seconds, again = task.step.seconds, outcome.solution.recompute_seconds
    return Point(
        name=name,
        budget_bytes=budget_bytes,
        peak_bytes=outcome.timeline.peak_bytes,
        step_seconds=seconds + again,
        overhead=again / seconds if seconds else 0.0,
    )
