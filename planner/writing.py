"""Writes a solved step down as a plan document. Depends on the planner's records."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch

from memfit.planner import document
from memfit.planner.alive import make_timeline
from memfit.planner.options import RegionOption
from memfit.planner.peak import describe_peak
from memfit.planner.preparing import Prepared
from memfit.planner.regions import Region
from memfit.planner.solving import Outcome, Task
from memfit.planner.step_graph import StepGraph
from memfit.solvers import Solution


def write_plan(prepared: Prepared, outcome: Outcome) -> document.Plan:
    """The plan that ``outcome`` is, with the figures of the simulator."""
    task, solution = outcome.task, outcome.solution
    baselines = [task.baseline(name) for name in ("none", "full")]
    peak = describe_peak(task.step, task.regions, outcome.timeline)
    workload = prepared.workload
    if solution.note:
        note = f"solved by {solution.solver}: {solution.note}"
        workload = replace(workload, notes=(*workload.notes, note))
    return document.Plan(
        made_with=document.MadeWith(
            _version("memfit") or "unknown", torch.__version__, _version("transformers")
        ),
        model=prepared.model,
        workload=workload,
        budget_bytes=task.budget_bytes,
        predicted=document.Predicted(
            peak_bytes=outcome.timeline.peak_bytes,
            peak_at=peak.where,
            resident_bytes=task.resident_bytes,
            step_seconds=outcome.step_seconds,
            recompute_seconds=solution.recompute_seconds,
            overhead=outcome.overhead,
            unplanned_peak_bytes=baselines[0].timeline.peak_bytes,
            unplanned_step_seconds=task.step.seconds,
            alive_at_peak=peak.alive_bytes,
        ),
        solver=document.SolverReport(
            solution.solver, solution.status.value, solution.gap, solution.solve_seconds
        ),
        regions=_regions(task, solution),
        baselines=tuple(map(_baseline, baselines)),
        timeline=make_timeline(outcome),
    )


def _regions(task: Task, solution: Solution) -> tuple[document.RegionPlan, ...]:
    again = {
        r: seconds
        for segment in task.segments_of(solution)
        for r, seconds in enumerate(segment.seconds, segment.first)
    }
    regions = []
    for r, c in enumerate(solution.choices):
        if lead := task.options[r][c].lead:
            regions.append(document.RegionPlan(lead, "selective", (), 0, 0, 0.0))
        regions.append(_region(task, r, c, again.get(r, 0.0)))
    return tuple(regions)


def _region(task: Task, index: int, choice: int, again: float) -> document.RegionPlan:
    region, options = task.regions[index], task.options[index]
    kept_bytes, stored_bytes = (_stored_bytes(task.step, region, options[o]) for o in (0, choice))
    return document.RegionPlan(
        name=region.name,
        action=options[choice].action,
        keep=options[choice].keep,
        stored_bytes=stored_bytes,
        freed_bytes=kept_bytes - stored_bytes,
        recompute_seconds=options[choice].recompute_seconds + again,
        kept_because=region.kept_because,
        recompute=options[choice].recompute,
        recompute_input=options[choice].recompute_input,
    )


def _stored_bytes(step: StepGraph, region: Region, option: RegionOption) -> int:
    held = (
        step.storages[s].size_bytes
        for s, until in option.holds.items()
        if until > region.stop and not step.storages[s].kind.resident
    )
    return sum(held) + sum(size for size, _, _ in option.effect.extra)


def _baseline(outcome: Outcome) -> document.Baseline:
    return document.Baseline(outcome.solution.solver, outcome.timeline.peak_bytes, outcome.overhead)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
