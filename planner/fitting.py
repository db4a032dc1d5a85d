"""How large a batch, or how long a sequence, fits a budget: unplanned, planned, checkpointed.

Every size that is looked at is captured and simulated; only which one is looked at next is a guess.
Depends on the preparation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from memfit.planner.budget import exact_bytes
from memfit.planner.errors import InfeasibleBudget
from memfit.planner.preparing import Prepared
from memfit.planner.solving import Task

UNPLANNED, PLANNED, FULL = "unplanned", "planned", "full checkpointing"
WAYS = (UNPLANNED, PLANNED, FULL)
_BASELINES = {UNPLANNED: "none", FULL: "full"}


@dataclass(frozen=True, slots=True)
class Fit:
    """The largest size that fits in one way."""

    way: str
    size: int
    """0 where not even 1 fits; the other figures are 0 then."""
    is_limit: bool
    """Whether it is the largest that the model takes, and more would fit."""
    peak_bytes: int
    step_seconds: float
    overhead: float
    """Share of the unplanned step's seconds that is recomputed."""


def find_fits(
    prepare_size: Callable[[int], Prepared],
    budget_bytes: int,
    most: int | None = None,
    prepare_answer: Callable[[int], Prepared] | None = None,
) -> tuple[Fit, ...]:
    """The largest sizes within a budget, one for each of :data:`WAYS`.

    ``prepare_size`` prepares the step of a size from 1 to ``most``; one that fits is prepared by
    ``prepare_answer``, if that is given, which may take its time over the seconds: on a device, ops
    of a size that does not fit cannot be timed. What a step needs must not fall with its size.
    Raises :class:`InfeasibleBudget` when no plan of size 1 keeps the budget.
    """
    task_of = cache(lambda size: prepare_size(size).task)
    answer_of = task_of
    if prepare_answer is not None:
        answer_of = cache(lambda size: prepare_answer(size).task)
    needs = cache(lambda size, way: _needs(task_of(size), way))
    least = needs(1, PLANNED)
    if least > budget_bytes:
        raise InfeasibleBudget(
            f"not even the smallest step fits {exact_bytes(budget_bytes)}: it needs "
            f"{exact_bytes(least)} with a plan. Raise the budget, shard the model, or train fewer "
            "parameters.",
            least,
        )
    found = []
    for way in WAYS:
        size = largest(lambda size, way=way: needs(size, way), budget_bytes, most)  # type: ignore[misc]
        found.append(_fit(way, size, size == most, answer_of, budget_bytes))
    return tuple(found)


def largest(needs: Callable[[int], int], budget_bytes: int, most: int | None = None) -> int:
    """Largest size from 1 to ``most`` that needs at most the budget; 0 if there is none.

    ``needs`` must not fall. It is taken for a line to choose what to look at next, and halved in
    between where it is none.
    """
    known: dict[int, int] = {}
    low, high = 0, most + 1 if most is not None else None
    while high is None or high - low > 1:
        size = _next(known, low, high, budget_bytes)
        known[size] = needs(size)
        if known[size] <= budget_bytes:
            low = size
        else:
            high = size
    return low


def _next(known: dict[int, int], low: int, high: int | None, budget_bytes: int) -> int:
    """A size above ``low`` and below ``high``."""
    guess = 2 * low or 1
    sizes = sorted(known, key=lambda size: abs(known[size] - budget_bytes))[:2]
    if len(sizes) == 2 and len(known) % 3:
        a, b = sorted(sizes)
        if slope := (known[b] - known[a]) / (b - a):
            guess = int(a + (budget_bytes - known[a]) / slope)
    elif high is not None:
        guess = (low + high) // 2
    top = high - 1 if high is not None else 8 * max(1, low)
    return max(low + 1, min(guess, top))


def _needs(task: Task, way: str) -> int:
    """Bytes of the smallest budget that a step fits in one way."""
    if way == PLANNED:
        return task.smallest_budget()
    return task.baseline(_BASELINES[way]).needs_bytes


def _fit(
    way: str, size: int, is_limit: bool, task_of: Callable[[int], Task], budget_bytes: int
) -> Fit:
    if not size:
        return Fit(way, 0, False, 0, 0.0, 0.0)
    task = task_of(size)
    if way == PLANNED:
        outcome = task.within(budget_bytes).solve("auto")
    else:
        outcome = task.baseline(_BASELINES[way])
    return Fit(
        way=way,
        size=size,
        is_limit=is_limit,
        peak_bytes=outcome.timeline.peak_bytes,
        step_seconds=outcome.step_seconds,
        overhead=outcome.overhead,
    )
