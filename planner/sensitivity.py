"""How a plan would change with its budget, for ``memfit explain``.

Nothing is solved again: budgets around the plan's own are reached from its choice by single changes
(see :mod:`memfit.solvers.nearby`, also for how near that is). Their seconds are at most those that
are stated, by the rows of the problem; the simulator is not asked. Depends on the step's records
and on the solvers.
"""

from memfit.planner.document import NearbyBudget, Sensitivity
from memfit.planner.solving import Outcome
from memfit.solvers import nearby_seconds

# Budgets beside the plan's own, in percent of it.
_PERCENT = (90, 95, 105, 110)


def find_sensitivity(outcome: Outcome, unplanned_peak_bytes: int) -> Sensitivity:
    """What smaller and larger budgets than the plan's would do."""
    task = outcome.task
    margin_bytes = task.margin_bytes
    free_bytes = unplanned_peak_bytes + margin_bytes
    least_bytes = task.problem.unavoidable_bytes + margin_bytes
    own_bytes = min(task.budget_bytes, free_bytes)
    budgets = [
        budget
        for budget in (own_bytes * percent // 100 for percent in _PERCENT)
        if least_bytes <= budget < free_bytes
    ]
    rows = [budget - margin_bytes for budget in budgets]
    seconds = nearby_seconds(task.problem, outcome.solution.choices, rows)
    return Sensitivity(
        unavoidable_bytes=least_bytes,
        free_budget_bytes=free_bytes,
        nearby=tuple(map(NearbyBudget, budgets, seconds)),
    )
