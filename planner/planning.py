"""``plan()``: capture the step, price it, solve, and write down what the simulator says.

This file only joins the parts; each arrow of the way is a frozen record. Depends on the rest of the
planner and on the solvers.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from memfit.planner import document
from memfit.planner.batches import Batch, make_batch
from memfit.planner.bound import find_bounds
from memfit.planner.budget import format_bytes
from memfit.planner.caching import cache_note
from memfit.planner.capture import BatchArguments, capture
from memfit.planner.costs import price
from memfit.planner.fingerprint import fingerprint
from memfit.planner.measuring import measured_seconds
from memfit.planner.optimizers import optimizer_factory
from memfit.planner.options import RegionOption
from memfit.planner.peak import describe_peak
from memfit.planner.regions import Region
from memfit.planner.shadows import tensors_in
from memfit.planner.solving import Outcome, Task
from memfit.planner.step_graph import StepGraph
from memfit.planner.target import Target, find_target, resolve_budget
from memfit.solvers import SOLVERS, Limits, Solution
from memfit.solvers import save_problem as write_problem

Progress = Callable[[str], None]


@contextmanager
def _no_cycles() -> Iterator[None]:
    """Pauses Python's collector of cycles, a quarter of the time: it walks the records for nothing.

    Nor may it decide when a fake tensor dies.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_cycles()
def plan(
    model: nn.Module,
    budget: int | str,
    batch: BatchArguments | Batch | None = None,
    *,
    optimizer: str | torch.optim.Optimizer | None = None,
    device: str | None = None,
    solver: str = "auto",
    costs: str = "auto",
    keep_outputs: bool = False,
    keep_gradients: bool = False,
    max_grad_norm: float | None = None,
    autocast: str | torch.dtype | None = None,
    selective: bool = True,
    gap: float = 0.0,
    time_limit_seconds: float = 20.0,
    save_problem: str | Path | None = None,
    bound: bool = False,
    progress: Progress | None = None,
) -> document.Plan:
    """Plans one training step of ``model`` into ``budget`` bytes of device memory.

    Parameters
    ----------
    model
        On any device, ``meta`` included. It is never changed, and no memory of its size is
        allocated. A model in eval mode is planned as if ``model.train()`` had been called.
    budget
        Peak of all device memory in a step: bytes as ``int``, ``"24GiB"`` / ``"24GB"``, or
        ``"auto"``: what the GPU has free, less a margin of 5 %.
    batch
        What the model is called with, labels included (a dict or tuple of tensors, real or meta),
        or ``Batch(size=8, length=2048)``. Left out, a batch is made from the config and named in
        the plan.
    optimizer
        ``None`` (forward and backward only), a name such as ``"adamw"``, or the optimizer itself.
    device
        ``"cpu"``, ``"cuda"`` or a name of the device table. Default: where the model is.
    solver
        ``"auto"``; a method by name: ``"count_ilp"``, ``"flat_ilp"``, ``"nested_dp"``,
        ``"greedy"``; or a baseline: ``"none"``, ``"full"``, ``"every_2"``, ``"sqrt_n"``, ...
    costs
        Where the seconds come from: ``"measured"``: every distinct op is run a few times, alone, on
        the device, which must be present; ``"roofline"`` over the device table; or ``"auto"``:
        measured where that can be.
    keep_outputs
        Plan for a caller who holds the model's outputs during the backward
        (``out = model(**batch); out.loss.backward()``); by default only the loss is held.
    keep_gradients
        Plan for a step that finds gradients of earlier ones and adds to them: the last of several
        whose gradients are accumulated, or any after ``zero_grad(set_to_none=False)``.
    max_grad_norm
        The norm to which gradients are clipped before the optimizer step, if they are.
    autocast
        ``"bfloat16"`` or ``"float16"`` when the forward runs under ``torch.autocast`` with that
        dtype. Left out, what is switched on around the call of ``plan``.
    selective
        Offer the action ``selective``: keep some activations of a region and recompute the others
        op by op. Without it regions are kept or checkpointed whole.
    gap, time_limit_seconds
        When the integer program may stop: once it has proved that no choice saves more than the
        share ``gap`` of the step's seconds, or after so long.
    save_problem
        A file for the solver's problem, which ``memfit solve`` reads.
    bound
        Say in the plan how far it is at most from the best that its regions allow and, for a step
        of few ops, from the best schedule of any kind.
    progress
        Called with a line of text when a part of the work begins.

    Raises
    ------
    InfeasibleBudget
        With ``minimum_bytes``, the smallest budget that has a plan.
    CaptureError, BudgetError, DeviceError, OptimizerError
        For arguments that cannot be planned, naming the way out.
    """
    _check_types(model, batch, device)
    say = progress or (lambda _: None)
    target = find_target(model, device)
    budget_bytes = resolve_budget(budget, target)
    arguments, batch_note = _arguments(model, batch)
    on_gpu = target.device.kind == "cuda"
    factory = optimizer_factory(optimizer, model, foreach=on_gpu, max_grad_norm=max_grad_norm)
    say(f"capturing a training step of {type(model).__name__}")
    cast_to = target.autocast_dtype(autocast)
    step = capture(
        model,
        arguments,
        optimizer=factory,
        keep_outputs=keep_outputs,
        keep_gradients=keep_gradients,
        autocast=cast_to,
        modes=target.modes,
    )
    step = target.with_workspace(step)
    step, costs = _priced(step, target, costs, say)
    say("finding regions and what they can keep")
    limits = Limits(0.0, time_limit_seconds, gap * step.seconds)
    task = Task.of(step, target, budget_bytes, limits, selective)
    say(f"solving for {format_bytes(budget_bytes)}")
    if save_problem is not None:
        write_problem(task.problem, save_problem)
    outcome = task.solve(solver)
    if save_problem is not None and outcome.task is not task:
        write_problem(outcome.task.problem, save_problem)
    say("simulating the plan")
    notes = (batch_note, *target.notes, *step.notes, cache_note(model), _solver_note(outcome))
    workload = document.Workload(
        batch=_batch_specs(arguments),
        optimizer=factory.name if factory else None,
        device=target.device.name,
        costs=costs,
        keep_outputs=keep_outputs,
        keep_gradients=keep_gradients,
        max_grad_norm=max_grad_norm,
        autocast=str(cast_to).removeprefix("torch.") if cast_to else None,
        notes=tuple(filter(None, notes)),
    )
    written = _write_plan(outcome, model, workload)
    if not bound:
        return written
    say("looking for bounds")
    return replace(written, bounds=find_bounds(outcome))


def _priced(step: StepGraph, target: Target, costs: str, say: Progress) -> tuple[StepGraph, str]:
    """The step with seconds, and where they come from in words."""
    say("pricing its ops")
    if costs == "auto":
        costs = "measured" if target.is_present else "roofline"
    if costs == "roofline":
        return price(step, target.device), f"roofline of {target.device.name}"
    if costs != "measured":
        raise ValueError(f"unknown costs {costs!r}; known are 'auto', 'measured' and 'roofline'")
    say(f"timing ops on {target.device.name}")
    seconds = measured_seconds(step, target.present())
    priced = price(step, target.device, seconds)
    total = sum(op.seconds for op in priced.ops) or 1.0
    by_roofline = sum(op.seconds for op in priced.ops if op.signature not in seconds)
    return (
        priced,
        f"measured on {target.device.name} ({1 - by_roofline / total:.0%} of the seconds)",
    )


def _write_plan(outcome: Outcome, model: nn.Module, workload: document.Workload) -> document.Plan:
    task, solution = outcome.task, outcome.solution
    none, full = (task.simulate(SOLVERS[name](task.problem)) for name in ("none", "full"))
    peak = describe_peak(task.step, task.regions, outcome.timeline)
    seconds = task.step.seconds
    return document.Plan(
        made_with=document.MadeWith(
            _version("memfit") or "unknown", torch.__version__, _version("transformers")
        ),
        model=_model(model),
        workload=workload,
        budget_bytes=task.budget_bytes,
        predicted=document.Predicted(
            peak_bytes=outcome.timeline.peak_bytes,
            peak_at=peak.where,
            resident_bytes=task.resident_bytes,
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
        regions=_regions(task, solution),
        baselines=tuple(_baseline(o, seconds) for o in (none, full)),
    )


def _solver_note(outcome: Outcome) -> str:
    solution = outcome.solution
    return f"solved by {solution.solver}: {solution.note}" if solution.note else ""


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
    stored = [_stored_bytes(task.step, region, o) for o in options]
    return document.RegionPlan(
        name=region.name,
        action=options[choice].action,
        keep=options[choice].keep,
        stored_bytes=stored[choice],
        freed_bytes=stored[0] - stored[choice],
        recompute_seconds=options[choice].recompute_seconds + again,
        kept_because=region.kept_because,
        recompute=options[choice].recompute,
        recompute_input=options[choice].recompute_input,
    )


def _stored_bytes(step: StepGraph, region: Region, option: RegionOption) -> int:
    held = (
        step.storages[s].size_bytes
        for s, until in option.effect.holds.items()
        if until > region.stop and not step.storages[s].kind.resident
    )
    return sum(held) + sum(size for size, _, _ in option.effect.extra)


def _baseline(outcome: Outcome, unplanned_seconds: float) -> document.Baseline:
    solution = outcome.solution
    return document.Baseline(
        solution.solver,
        outcome.timeline.peak_bytes,
        _share(solution.recompute_seconds, unplanned_seconds),
    )


def _check_types(model: object, batch: object, device: object) -> None:
    """Names what cannot be planned before anything is tried with it."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {model!r:.80}; pass a torch.nn.Module, such as a transformers model"
        )
    if not isinstance(batch, (Mapping, tuple, list, Batch, type(None))):
        raise TypeError(
            f"batch is a {type(batch).__name__}; pass what the model is called with as a dict or a "
            "tuple, or Batch(size=8, length=2048)"
        )
    if not isinstance(device, (str, type(None))):
        raise TypeError(f"device is {device!r}; pass a name, such as 'cpu', 'cuda' or 'h100'")


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
