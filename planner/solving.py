"""Solves a priced step for a budget: options, the integer program, and the simulator's last word.

A choice whose simulated peak misses the budget is solved again, tighter, and never returned.
Depends on the planner's records and on the solvers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memfit.planner.actions import find_options
from memfit.planner.budget import exact_bytes, format_bytes
from memfit.planner.errors import InfeasibleBudget, SolverError
from memfit.planner.options import RegionOption, SegmentOption, build_problem
from memfit.planner.regions import Region, find_regions
from memfit.planner.segments import find_segments, with_reruns
from memfit.planner.simulate import Timeline, simulate
from memfit.planner.step_graph import StepGraph
from memfit.planner.target import Target
from memfit.solvers import (
    AUTO,
    BASELINES,
    NESTED,
    SOLVERS,
    Limits,
    NoSolver,
    Problem,
    ProblemError,
    Solution,
    Status,
    chosen_segments,
    minimise_peak,
)

# How often a choice whose simulated peak misses the budget is solved again.
TIGHTENINGS = 8
# Of what checkpointing everything recomputes: from there on segments may be worth it.
_NEARLY = 0.9
_ANY_BYTES = 1 << 62
_ALL_FITS = "everything fits, so that there was nothing to choose"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A choice and what the simulator says of it."""

    solution: Solution
    timeline: Timeline
    task: "Task"
    """Whose options were chosen."""

    @property
    def needs_bytes(self) -> int:
        """The smallest budget that the choice keeps."""
        return self.timeline.peak_bytes + self.task.margin_bytes

    @property
    def step_seconds(self) -> float:
        """Of a step, recomputation included."""
        return self.task.step.seconds + self.solution.recompute_seconds

    @property
    def overhead(self) -> float:
        """Share of the unplanned step's seconds that is recomputed."""
        seconds = self.task.step.seconds
        return self.solution.recompute_seconds / seconds if seconds else 0.0


def _faster(a: Outcome | None, b: Outcome | None) -> Outcome | None:
    """The one that recomputes for less, the first if there is no difference."""
    found = [outcome for outcome in (a, b) if outcome is not None]
    return min(found, key=lambda outcome: outcome.solution.recompute_seconds, default=None)


@dataclass(frozen=True, slots=True)
class Task:
    """A priced step with its regions, their options and the solver's problem."""

    step: StepGraph
    target: Target
    regions: tuple[Region, ...]
    options: tuple[tuple[RegionOption, ...], ...]
    problem: Problem
    limits: Limits
    budget_bytes: int
    """The budget that was asked for."""
    segments: tuple[SegmentOption, ...] = ()
    offers_segments: bool = True
    """Whether several regions may be recomputed together."""
    margin_bytes: int = 0
    """What the step's guesses and the device's slack leave free of a budget."""

    @staticmethod
    def of(
        step: StepGraph,
        target: Target,
        limits: Limits,
        selective: bool = True,
        gathered: Sequence[str] = (),
    ) -> "Task":
        """A task whose budget holds whatever the step needs.

        ``gathered`` are modules whose parameters are whole in their own forward and backward only.
        """
        regions = find_regions(step, gathered)
        options = find_options(
            step, regions, target.rng_state_bytes, offer_selective=selective, gathered=gathered
        )
        rounded = target.device.allocation_bytes
        problem = build_problem(step, regions, options, _ANY_BYTES, rounded)
        task = Task(step, target, regions, options, problem, limits, _ANY_BYTES)
        task = replace(task, offers_segments=not gathered)
        margin_bytes = target.slack_bytes
        if step.margin:
            adds_bytes = task.baseline("none").timeline.peak_bytes - task.resident_bytes
            margin_bytes += int(step.margin * adds_bytes)
        return replace(task, margin_bytes=margin_bytes)

    def within(self, budget_bytes: int) -> "Task":
        """The task with another budget, of which the margin is left free."""
        own_bytes = max(1, budget_bytes - self.margin_bytes)
        problem = replace(self.problem, budget_bytes=own_bytes)
        return replace(self, problem=problem, budget_bytes=budget_bytes)

    def with_segments(self) -> "Task":
        """The task that may choose segments, beside those options that do not depend on costs."""
        lean = tuple(tuple(o for o in own if o.lean) for own in self.options)
        options, segments = find_segments(
            self.step, self.regions, lean, self.target.rng_state_bytes
        )
        problem = build_problem(
            self.step,
            self.regions,
            options,
            self.problem.budget_bytes,
            self.target.device.allocation_bytes,
            segments,
        )
        return replace(self, options=options, problem=problem, segments=segments)

    def smallest_budget(self) -> int:
        """Bytes of the smallest budget that has a plan."""
        try:
            return self.within(1).solve(AUTO).needs_bytes
        except InfeasibleBudget as error:
            return error.minimum_bytes

    def baseline(self, name: str) -> Outcome:
        """What people do by hand, whatever the budget."""
        return self.simulate(SOLVERS[name](self.problem, self.limits))

    def solve(self, solver: str) -> Outcome:
        """A choice whose simulated peak keeps the budget, or :class:`InfeasibleBudget`.

        It may be one of another task's, with segments: see :attr:`Outcome.task`.
        """
        if solver not in SOLVERS:
            raise SolverError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
        if solver in NESTED and not self.offers_segments:
            raise SolverError(
                f"the solver {solver!r} recomputes several regions together, for which FSDP2 does "
                "not gather the weights; use 'auto'"
            )
        task = self.with_segments() if solver in NESTED else self
        try:
            outcome = task._solve(solver)
            if solver == AUTO and self._may_need_segments(outcome):
                task = self.with_segments()
                outcome = _faster(outcome, task._solve(solver))
            if outcome is None:
                outcome = task._lowest()
        except (NoSolver, ProblemError) as error:
            raise SolverError(f"the solver {solver!r} cannot be used here: {error}") from error
        if outcome.timeline.peak_bytes > self.problem.budget_bytes:
            raise self._infeasible(solver, outcome.timeline.peak_bytes)
        return outcome

    def _may_need_segments(self, outcome: Outcome | None) -> bool:
        """Whether nothing fits that could, or only what recomputes nearly everything."""
        if not self.offers_segments:
            return False
        if outcome is None:
            lowest = minimise_peak(self.lean_problem(), self.limits).peak_bytes
            return lowest > self.problem.unavoidable_bytes
        full = SOLVERS["full"](self.problem).recompute_seconds
        return 0 < _NEARLY * full <= outcome.solution.recompute_seconds

    def _lowest(self) -> Outcome:
        """The choice of lowest peak. How long it takes is only looked at if it fits."""
        problem = self.lean_problem()
        outcome = self.simulate(minimise_peak(problem, self.limits, any_seconds=True))
        fits = outcome.timeline.peak_bytes <= self.problem.budget_bytes
        if not fits or not problem.segments:  # without segments it is the fastest already
            return outcome
        faster = self.simulate(minimise_peak(problem, self.limits))
        # The rows are the same in both, the simulated peaks may not be.
        return faster if faster.timeline.peak_bytes <= self.problem.budget_bytes else outcome

    def _solve(self, solver: str) -> Outcome | None:
        if solver in BASELINES:
            return self._by(solver, self.problem)
        return self._within_budget(solver)

    def _within_budget(self, solver: str) -> Outcome | None:
        """The fastest choice that the simulator lets pass; None when the rows allow none."""
        keep = self.baseline("none")
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

    def lean_problem(self) -> Problem:
        """The problem without the options that depend on what ops cost, which come last."""
        if self.segments:
            return self.problem
        counts = [sum(option.lean for option in options) for options in self.options]
        return self.problem.first_options(counts)

    def _by(self, solver: str, problem: Problem) -> Outcome | None:
        solution = SOLVERS[solver](problem, self.limits)
        if not solution.choices and problem.regions:
            return None
        return self.simulate(solution)

    def simulate(self, solution: Solution) -> Outcome:
        chosen = [o[c].effect for o, c in zip(self.options, solution.choices, strict=True)]
        effects = with_reruns(chosen, self.segments_of(solution))
        timeline = simulate(self.step, self.regions, effects, self.target.device.allocation_bytes)
        return Outcome(solution, timeline, self)

    def segments_of(self, solution: Solution) -> list[SegmentOption]:
        """The segments of a choice."""
        by_choice = {(own.first, own.choices): own for own in self.segments}
        segments = chosen_segments(self.problem, solution.choices)
        return [by_choice[segment.first, segment.choices] for segment in segments]

    @property
    def resident_bytes(self) -> int:
        """Bytes allocated before the step begins, as the allocator takes them."""
        return self.step.resident_bytes(self.target.device.allocation_bytes)

    def _infeasible(self, solver: str, minimum_bytes: int) -> InfeasibleBudget:
        budget = self.budget_bytes
        minimum_bytes += self.margin_bytes
        # Rounded up, so that it can be typed back as it stands.
        smallest = f"{-(-minimum_bytes // 2**20)} MiB ({minimum_bytes} bytes)"
        way_out = "Raise the budget, or make the batch smaller or shorter."
        if self.resident_bytes > budget:
            way_out = (
                f"{format_bytes(self.resident_bytes)} of it are there before the step begins "
                "(parameters, optimizer state, batch): shard the model over several GPUs, or train "
                "fewer parameters."
            )
        if solver in (AUTO, *NESTED) and solver not in BASELINES:
            what = f"no plan keeps this step within {exact_bytes(budget)}; the "
            what += f"smallest budget that has a plan is {smallest}"
        else:
            what = f"{solver!r} needs {smallest}, more than {exact_bytes(budget)}"
            way_out = "Raise the budget, or plan with the solver 'auto'."
        return InfeasibleBudget(f"{what}. {way_out}", minimum_bytes)
