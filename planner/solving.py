"""Solves a priced step for a budget: options, the integer program, and the simulator's last word.

A choice whose simulated peak misses the budget is solved again, tighter, and never returned.
Depends on the planner's records and on the solvers.
"""

from dataclasses import dataclass, replace

from memfit.planner import recompute
from memfit.planner.budget import format_bytes
from memfit.planner.errors import InfeasibleBudget
from memfit.planner.options import RegionOption, build_problem
from memfit.planner.regions import Region, find_regions
from memfit.planner.simulate import Timeline, simulate
from memfit.planner.step_graph import StepGraph
from memfit.planner.target import Target
from memfit.solvers import SOLVERS, Limits, Problem, Solution, flat_ilp

# How often a choice whose simulated peak misses the budget is solved again.
TIGHTENINGS = 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """A choice and what the simulator says of it."""

    solution: Solution
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class Task:
    """A priced step with its regions, their options and the solver's problem."""

    step: StepGraph
    target: Target
    regions: tuple[Region, ...]
    options: tuple[tuple[RegionOption, ...], ...]
    problem: Problem
    limits: Limits

    @staticmethod
    def of(step: StepGraph, target: Target, budget_bytes: int, limits: Limits) -> "Task":
        regions = find_regions(step)
        options = tuple(_options(step, region, target.rng_state_bytes) for region in regions)
        problem = build_problem(
            step, regions, options, budget_bytes, target.device.allocation_bytes
        )
        return Task(step, target, regions, options, problem, limits)

    def solve(self, solver: str) -> Outcome:
        """A choice whose simulated peak keeps the budget, or :class:`InfeasibleBudget`."""
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
        budget, aim = self.problem.budget_bytes, self.problem.budget_bytes
        for _ in range(TIGHTENINGS):
            solution = SOLVERS[solver](replace(self.problem, budget_bytes=aim), self.limits)
            if not solution.choices:
                break
            outcome = self.simulate(solution)
            if outcome.timeline.peak_bytes <= budget:
                return outcome
            if solver != "ilp":
                break
            aim -= outcome.timeline.peak_bytes - budget
        smallest = self.simulate(flat_ilp.minimise_peak(self.problem, self.limits))
        if smallest.timeline.peak_bytes <= budget and solver == "ilp":
            return smallest
        raise self._infeasible(solver, smallest.timeline.peak_bytes)

    def simulate(self, solution: Solution) -> Outcome:
        chosen = [o[c].effect for o, c in zip(self.options, solution.choices, strict=True)]
        timeline = simulate(self.step, self.regions, chosen, self.target.device.allocation_bytes)
        return Outcome(solution, timeline)

    @property
    def resident_bytes(self) -> int:
        """Bytes allocated before the step begins, as the allocator takes them."""
        return self.step.resident_bytes(self.target.device.allocation_bytes)

    def _infeasible(self, solver: str, minimum_bytes: int) -> InfeasibleBudget:
        budget = self.problem.budget_bytes
        what = "no plan" if solver == "ilp" else f"{solver!r} does not"
        return InfeasibleBudget(
            f"{what} keeps this step within {format_bytes(budget)} ({budget} bytes); the smallest "
            f"budget that has a plan is {format_bytes(minimum_bytes)} ({minimum_bytes} bytes). "
            "Raise the budget, or make the batch smaller or shorter.",
            minimum_bytes,
        )


def _options(step: StepGraph, region: Region, rng_state_bytes: int) -> tuple[RegionOption, ...]:
    keep = RegionOption("keep", recompute.keep(step, region), 0.0)
    if region.kept_because:
        return (keep,)
    effect = recompute.checkpoint(step, region, rng_state_bytes)
    assert effect.recomputation is not None
    seconds = sum(step.ops[i].seconds for i in effect.recomputation.ops)
    return keep, RegionOption("checkpoint", effect, seconds)
