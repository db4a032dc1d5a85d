"""The trade-off of memory and time: what a step costs at every peak that it can be planned into.

One preparation, many solves. Depends on the preparation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from memfit.planner.preparing import Prepared, Progress, no_cycles
from memfit.planner.solving import Outcome

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
    its peak never higher. After them come the baselines that differ. ``points`` is 2 at least.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a curve has 2 at least")
    say = progress or (lambda _: None)
    # Of two plans as fast as each other, the one for the smaller budget has the lower peak.
    limits = replace(prepared.task.limits, lowest_peak=False)
    task = replace(prepared.task, limits=limits)
    by_hand = _distinct({name: task.baseline(name) for name in BY_HAND})
    most = by_hand["none"].needs_bytes
    say("solving for the smallest budget")
    least = min(task.smallest_budget(), most)
    budgets = [least + (most - least) * number // (points - 1) for number in range(points)]
    outcomes = []
    for number, budget in enumerate(budgets, start=1):
        say(f"solving for point {number} of {points}")
        outcomes.append(task.within(budget).solve("auto"))
    plans = (_point(PLAN, budget, _best(outcomes, budget)) for budget in budgets)
    baselines = (_point(name, made.needs_bytes, made) for name, made in by_hand.items())
    return (*plans, *baselines)


def _distinct(by_hand: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Without those that choose what one further on chooses."""
    last = {outcome.solution.choices: name for name, outcome in by_hand.items()}
    return {n: outcome for n, outcome in by_hand.items() if last[outcome.solution.choices] == n}


def _best(outcomes: Sequence[Outcome], budget_bytes: int) -> Outcome:
    """The fastest that fits, of all budgets' plans: solvers stop within a gap, each at another."""
    fitting = (outcome for outcome in outcomes if outcome.needs_bytes <= budget_bytes)
    return min(fitting, key=lambda o: (o.solution.recompute_seconds, o.timeline.peak_bytes))


def _point(name: str, budget_bytes: int, outcome: Outcome) -> Point:
    return Point(
        name=name,
        budget_bytes=budget_bytes,
        peak_bytes=outcome.timeline.peak_bytes,
        step_seconds=outcome.step_seconds,
        overhead=outcome.overhead,
    )
