"""``plan()``: capture the step, price it, find regions, solve, and let the simulator have the last word.

This file only joins the parts; each arrow of the way is a frozen record. Depends on the rest of the
planner and on the solvers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from memfit.planner import document, recompute
from memfit.planner.batches import Batch, make_batch
from memfit.planner.budget import format_bytes, parse_budget
from memfit.planner.capture import BatchArguments, capture
from memfit.planner.costs import price
from memfit.planner.errors import InfeasibleBudget
from memfit.planner.fingerprint import fingerprint
from memfit.planner.optimizers import optimizer_factory
from memfit.planner.options import RegionOption, build_problem
from memfit.planner.peak import describe_peak
from memfit.planner.regions import Region, find_regions
from memfit.planner.shadows import tensors_in
from memfit.planner.simulate import Timeline, simulate
from memfit.planner.step_graph import StepGraph
from memfit.planner.target import Target, find_target, free_bytes
from memfit.solvers import SOLVERS, Limits, Problem, Solution, flat_ilp

Progress = Callable[[str], None]

# How often a plan whose simulated peak misses the budget is solved again, tighter.
_TIGHTENINGS = 8


def plan(
    model: nn.Module,
    budget: int | str,
    batch: BatchArguments | Batch | None = None,
    *,
    optimizer: str | torch.optim.Optimizer | None = None,
    device: str | None = None,
    solver: str = "ilp",
    keep_outputs: bool = False,
    gap: float = 1e-4,
    time_limit_seconds: float = 20.0,
    progress: Progress | None = None,
) -> document.Plan:
    """Plans one training step of ``model`` into ``budget`` bytes of device memory.

    Parameters
    ----------
    model
        On any device, ``meta`` included. It is never changed, and no memory of its size is allocated.
        A model in eval mode is planned as if ``model.train()`` had been called.
    budget
        Peak of all device memory in a step: bytes as ``int``, ``"24GiB"`` / ``"24GB"``, or ``"auto"``:
        what the GPU has free, less a margin of 5 %.
    batch
        What the model is called with, labels included (a dict or tuple of tensors, real or meta), or
        ``Batch(size=8, length=2048)``. Left out, a batch is made from the config and named in the plan.
    optimizer
        ``None`` (forward and backward only), a name such as ``"adamw"``, or the optimizer itself.
    device
        ``"cpu"``, ``"cuda"`` or a name of the device table. Default: where the model is.
    solver
        ``"ilp"`` or a baseline: ``"none"``, ``"full"``, ``"every_2"``, ...
    keep_outputs
        Plan for a caller who holds the model's outputs during the backward
        (``out = model(**batch); out.loss.backward()``); by default only the loss is held.
    gap, time_limit_seconds
        When the integer program may stop.
    progress
        Called with a line of text when a part of the work begins.

    Raises
    ------
    InfeasibleBudget
        With ``minimum_bytes``, the smallest budget that has a plan.
    CaptureError, BudgetError, DeviceError, OptimizerError
        For arguments that cannot be planned, naming the way out.
    """
    say = progress or (lambda _: None)
    target = find_target(model, device)
    budget_bytes = free_bytes(target) if budget == "auto" else parse_budget(budget)
    arguments, batch_note = _arguments(model, batch)
    factory = optimizer_factory(optimizer, model, foreach=target.device.kind == "cuda")
    say(f"capturing a training step of {type(model).__name__}")
    step = capture(
        model, arguments, optimizer=factory, keep_outputs=keep_outputs, modes=target.modes()
    )
    step = price(step, target.device)
    say(f"solving for {format_bytes(budget_bytes)}")
    task = _Task.of(step, target, budget_bytes, Limits(gap, time_limit_seconds))
    outcome = task.solve(solver)
    workload = document.Workload(
        batch=_batch_specs(arguments),
        optimizer=factory.name if factory else None,
        device=target.device.name,
        costs=target.costs,
        keep_outputs=keep_outputs,
        notes=tuple(n for n in (batch_note, *target.notes, *step.notes) if n),
    )
    return task.document(outcome, model, workload)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A choice and what the simulator says of it."""

    solution: Solution
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class _Task:
    """A priced step with its regions, their options and the solver's problem."""

    step: StepGraph
    target: Target
    regions: tuple[Region, ...]
    options: tuple[tuple[RegionOption, ...], ...]
    problem: Problem
    limits: Limits

    @staticmethod
    def of(step: StepGraph, target: Target, budget_bytes: int, limits: Limits) -> "_Task":
        regions = find_regions(step)
        options = tuple(_options(step, region, target.rng_state_bytes) for region in regions)
        problem = build_problem(
            step, regions, options, budget_bytes, target.device.allocation_bytes
        )
        return _Task(step, target, regions, options, problem, limits)

    def solve(self, solver: str) -> _Outcome:
        """A choice whose simulated peak keeps the budget; :class:`InfeasibleBudget` if there is none."""
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
        budget, aim = self.problem.budget_bytes, self.problem.budget_bytes
        for _ in range(_TIGHTENINGS):
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

    def simulate(self, solution: Solution) -> _Outcome:
        chosen = [o[c].effect for o, c in zip(self.options, solution.choices, strict=True)]
        timeline = simulate(
            self.step, self.regions, chosen, self.target.device.allocation_bytes
        )
        return _Outcome(solution, timeline)

    def _infeasible(self, solver: str, minimum_bytes: int) -> InfeasibleBudget:
        budget = self.problem.budget_bytes
        what = "no plan" if solver == "ilp" else f"{solver!r} does not"
        return InfeasibleBudget(
            f"{what} keeps this step within {format_bytes(budget)} ({budget} bytes); the smallest "
            f"budget that has a plan is {format_bytes(minimum_bytes)} ({minimum_bytes} bytes). "
            "Raise the budget, or make the batch smaller or shorter.",
            minimum_bytes,
        )

    def document(
        self, outcome: _Outcome, model: nn.Module, workload: document.Workload
    ) -> document.Plan:
        """The plan as data."""
        solution = outcome.solution
        none, full = (self.simulate(SOLVERS[name](self.problem)) for name in ("none", "full"))
        seconds = self.step.seconds
        peak = describe_peak(self.step, self.regions, outcome.timeline)
        return document.Plan(
            made_with=document.MadeWith(
                _version("memfit") or "unknown", torch.__version__, _version("transformers")
            ),
            model=_model(model),
            workload=workload,
            budget_bytes=self.problem.budget_bytes,
            predicted=document.Predicted(
                peak_bytes=outcome.timeline.peak_bytes,
                peak_at=peak.where,
                resident_bytes=self.resident_bytes,
                step_seconds=seconds + solution.recompute_seconds,
                recompute_seconds=solution.recompute_seconds,
                overhead=_share(solution.recompute_seconds, seconds),
                unplanned_peak_bytes=none.timeline.peak_bytes,
                unplanned_step_seconds=seconds,
                alive_at_peak=peak.alive_bytes,
            ),
            solver=document.SolverReport(
                solution.solver, solution.status.value, solution.gap, solution.solve_seconds
            ),
            regions=tuple(map(self._region, range(len(self.regions)), solution.choices)),
            baselines=tuple(
                document.Baseline(
                    o.solution.solver,
                    o.timeline.peak_bytes,
                    _share(o.solution.recompute_seconds, seconds),
                )
                for o in (none, full)
            ),
        )

    @property
    def resident_bytes(self) -> int:
        return self.step.resident_bytes(self.target.device.allocation_bytes)

    def _region(self, index: int, choice: int) -> document.RegionPlan:
        region, options = self.regions[index], self.options[index]
        stored = [self._stored_bytes(region, o) for o in options]
        return document.RegionPlan(
            name=region.name,
            action=options[choice].action,
            keep=(),
            stored_bytes=stored[choice],
            freed_bytes=stored[0] - stored[choice],
            recompute_seconds=options[choice].recompute_seconds,
            kept_because=region.kept_because,
        )

    def _stored_bytes(self, region: Region, option: RegionOption) -> int:
        held = (
            self.step.storages[s].size_bytes
            for s, until in option.effect.holds.items()
            if until > region.stop and not self.step.storages[s].kind.resident
        )
        return sum(held) + sum(size for size, _, _ in option.effect.extra)


def _options(step: StepGraph, region: Region, rng_state_bytes: int) -> tuple[RegionOption, ...]:
    keep = RegionOption("keep", recompute.keep(step, region), 0.0)
    if region.kept_because:
        return (keep,)
    effect = recompute.checkpoint(step, region, rng_state_bytes)
    assert effect.recomputation is not None
    seconds = sum(step.ops[i].seconds for i in effect.recomputation.ops)
    return keep, RegionOption("checkpoint", effect, seconds)


def _arguments(
    model: nn.Module, batch: BatchArguments | Batch | None
) -> tuple[BatchArguments, str]:
    if batch is None or isinstance(batch, Batch):
        return make_batch(model, batch)
    return batch, ""


def _batch_specs(batch: BatchArguments) -> dict[str, document.TensorSpec]:
    named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    return {
        str(name): document.TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, value in named
        for t in tensors_in(value)
    }


def _model(model: nn.Module) -> document.Model:
    parameters = list(model.parameters())
    return document.Model(
        type(model).__name__,
        fingerprint(model),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
