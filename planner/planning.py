"""``plan()``: prepare the step, solve it for a budget, and write down what the simulator says.

Depends on the rest of the planner.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from memfit.planner.batches import Batch
from memfit.planner.bound import find_bounds
from memfit.planner.budget import format_bytes
from memfit.planner.capture import BatchArguments
from memfit.planner.document import Plan
from memfit.planner.preparing import Progress, check_types, no_cycles, prepare
from memfit.planner.sensitivity import find_sensitivity
from memfit.planner.target import find_target, resolve_budget
from memfit.planner.writing import write_plan
from memfit.solvers import save_problem as write_problem


@no_cycles()
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
    sharding: str | None = None,
    world_size: int = 1,
    wrap: Sequence[str] | None = None,
    reshard_after_forward: bool | None = None,
    param_dtype: str | torch.dtype | None = None,
    reduce_dtype: str | torch.dtype | None = None,
    selective: bool = True,
    gap: float = 0.0,
    time_limit_seconds: float = 20.0,
    save_problem: str | Path | None = None,
    bound: bool = False,
    progress: Progress | None = None,
) -> Plan:
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
    sharding, world_size
        How the step is spread over processes, and over how many: ``"ddp"``, or ``"fsdp2"`` for a
        model of which every layer and then the model itself is given to ``fully_shard``. The batch,
        the budget and all figures are those of one process. What communication takes is not in
        the seconds.
    wrap, reshard_after_forward
        For FSDP2: the class names of the layers, where they are others than ``_no_split_modules``
        of the model, and what ``fully_shard`` is told. ``wrap`` also takes the name of a module,
        or of several that are given to one ``fully_shard``: ``"model.norm+lm_head"``; what ends in
        ``:whole`` is not resharded after the forward.
    param_dtype, reduce_dtype
        FSDP2's own mixed precision, as its ``MixedPrecisionPolicy`` has it: ``"bfloat16"``,
        ``"float16"`` or ``"float32"``.
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
    check_types(model, batch, device)
    say = progress or (lambda _: None)
    budget_bytes = resolve_budget(budget, find_target(model, device))
    prepared = prepare(
        model,
        batch,
        optimizer=optimizer,
        device=device,
        costs=costs,
        keep_outputs=keep_outputs,
        keep_gradients=keep_gradients,
        max_grad_norm=max_grad_norm,
        autocast=autocast,
        sharding=sharding,
        world_size=world_size,
        wrap=wrap,
        reshard_after_forward=reshard_after_forward,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        selective=selective,
        gap=gap,
        time_limit_seconds=time_limit_seconds,
        progress=say,
    )
    task = prepared.task.within(budget_bytes)
    say(f"solving for {format_bytes(budget_bytes)}")
    if save_problem is not None:
        write_problem(task.problem, save_problem)
    outcome = task.solve(solver)
    if save_problem is not None and outcome.task is not task:
        write_problem(outcome.task.problem, save_problem)
    say("simulating the plan")
    written = write_plan(prepared, outcome)
    sensitivity = find_sensitivity(outcome, written.predicted.unplanned_peak_bytes)
    written = replace(written, sensitivity=sensitivity)
    if not bound:
        return written
    say("looking for bounds")
    return replace(written, bounds=find_bounds(outcome))
