"""Solves a priced step for a budget: options, the integer program, and the simulator's last word.

A choice whose simulated peak misses the budget is solved again, tighter, and never returned.
Depends on the planner's records and on the solvers.
"""

from dataclasses import dataclass, replace

from memfit.planner.actions import find_options
from memfit.planner.budget import format_bytes
from memfit.planner.errors import InfeasibleBudget, SolverError
from memfit.planner.options import RegionOption, build_problem
from memfit.planner.regions import Region, find_regions
from memfit.planner.simulate import Timeline, simulate
from memfit.planner.step_graph import StepGraph
from memfit.planner.target import Target
from memfit.solvers import (
    BASELINES,
    SOLVERS,
    Limits,
    NoSolver,
    Problem,
    ProblemError,
    Solution,
    Status,
    minimise_peak,
)

# How often a choice whose simulated peak misses the budget is solved again.
TIGHTENINGS = 8
_ALL_FITS = "everything fits, so that there was nothing to choose"


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
    def of(
        step: StepGraph,
        target: Target,
        budget_bytes: int,
        limits: Limits,
        selective: bool = True,
    ) -> "Task":
        regions = find_regions(step)
        options = find_options(step, regions, target.rng_state_bytes, offer_selective=selective)
        problem = build_problem(
            step, regions, options, budget_bytes, target.device.allocation_bytes
        )
        return Task(step, target, regions, options, problem, limits)

    def solve(self, solver: str) -> Outcome:
        """A choice whose simulated peak keeps the budget, or :class:`InfeasibleBudget`."""
        if solver not in SOLVERS:
            raise SolverError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
        try:
            if solver in BASELINES:
                outcome = self._by(solver, self.problem)
            else:
                outcome = self._within_budget(solver)
            if outcome is None:
                outcome = self.simulate(minimise_peak(self._lean_problem(), self.limits))
        except (NoSolver, ProblemError) as error:
            raise SolverError(f"the solver {solver!r} cannot be used here: {error}") from error
        if outcome.timeline.peak_bytes > self.problem.budget_bytes:
            raise self._infeasible(solver, outcome.timeline.peak_bytes)
        return outcome

    def _within_budget(self, solver: str) -> Outcome | None:
        """The fastest choice that the simulator lets pass; None when the rows allow none."""
        keep = self.simulate(SOLVERS["none"](self.problem, self.limits))
        if keep.timeline.peak_bytes <= self.problem.budget_bytes:
            kept = replace(keep.solution, status=Status.OPTIMAL, gap=0.0, note=_ALL_FITS)
            return replace(keep, solution=kept)
        aim = self.problem.budget_bytes
        for _ in range(TIGHTENINGS):
            outcome = self._by(solver, replace(self.problem, budget_bytes=aim))
            if outcome is None:
                return None
            excess = outcome.timeline.peak_bytes - self.problem.budget_bytes
            if excess <= 0:
                return outcome
            aim -= excess
        return None

    def _lean_problem(self) -> Problem:
        """The problem without the options that depend on what ops cost, which come last."""
        counts = [sum(option.lean for option in options) for options in self.options]
        regions = tuple(
            replace(region, options=region.options[:count])
            for region, count in zip(self.problem.regions, counts, strict=True)
        )
        shared = tuple(
            replace(t, holders=tuple((r, o) for r, o in t.holders if o < counts[r]))
            for t in self.problem.shared
        )
        return replace(self.problem, regions=regions, shared=shared)

    def _by(self, solver: str, problem: Problem) -> Outcome | None:
        solution = SOLVERS[solver](problem, self.limits)
        if not solution.choices and problem.regions:
            return None
        return self.simulate(solution)

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
        # Rounded up, so that it can be typed back as it stands.
        smallest = f"{-(-minimum_bytes // 2**20)} MiB ({minimum_bytes} bytes)"
        way_out = "Raise the budget, or make the batch smaller or shorter."
        if solver not in BASELINES:
            what = f"no plan keeps this step within {format_bytes(budget)} ({budget} bytes); the "
            what += f"smallest budget that has a plan is {smallest}"
        else:
            what = f"{solver!r} needs {smallest}, more than {format_bytes(budget)} ({budget} bytes)"
            way_out = "Raise the budget, or plan with the solver 'auto'."
        return InfeasibleBudget(f"{what}. {way_out}", minimum_bytes)
