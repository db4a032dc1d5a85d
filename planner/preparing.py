"""A training step made ready for any budget: captured, priced, and cut into regions with options.

This file only joins the parts; each arrow of the way is a frozen record. Depends on the rest of the
planner but for ``planning``, which solves what is prepared here.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from memfit.planner import document
from memfit.planner._compat import uncompiled
from memfit.planner.batches import Batch, make_batch
from memfit.planner.caching import cache_note
from memfit.planner.capture import BatchArguments, capture
from memfit.planner.costs import price
from memfit.planner.fingerprint import fingerprint
from memfit.planner.measuring import measured_seconds
from memfit.planner.mixed_precision import dtype_name
from memfit.planner.optimizers import optimizer_factory
from memfit.planner.shadows import tensors_in
from memfit.planner.sharding import read_sharding
from memfit.planner.solving import Task
from memfit.planner.step_graph import StepGraph
from memfit.planner.target import Target, find_target
from memfit.solvers import Limits

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step that can be solved for a budget: ``prepared.task.within(budget_bytes).solve(...)``."""

    task: Task
    """Its budget holds whatever the step needs."""
    model: document.Model
    workload: document.Workload


@contextmanager
def no_cycles() -> Iterator[None]:
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


@no_cycles()
def prepare(
    model: nn.Module,
    batch: BatchArguments | Batch | None = None,
    *,
    optimizer: str | torch.optim.Optimizer | None = None,
    device: str | None = None,
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
    progress: Progress | None = None,
) -> Prepared:
    """What :func:`memfit.planner.plan`, whose arguments these are, does before a budget counts."""
    check_types(model, batch, device)
    model = uncompiled(model)
    say = progress or (lambda _: None)
    target = find_target(model, device)
    spread = read_sharding(
        sharding, world_size, wrap, reshard_after_forward, param_dtype, reduce_dtype, model
    )
    arguments, batch_note = _arguments(model, batch)
    on_gpu = target.device.kind == "cuda"
    factory = optimizer_factory(optimizer, model, on_gpu=on_gpu, max_grad_norm=max_grad_norm)
    say(f"capturing a training step of {type(model).__name__}")
    cast_to = target.autocast_dtype(autocast)
    step = capture(
        model,
        arguments,
        optimizer=factory,
        keep_outputs=keep_outputs,
        keep_gradients=keep_gradients and spread.shards == 1,
        autocast=cast_to,
        modes=target.modes,
        shards=spread.shards,
        casts=spread.casts,
    )
    step = target.with_workspace(step)
    step, costs = _priced(step, target, costs, say)
    stages = target.device.kind == "cpu"  # gloo's collectives do, NCCL's do not
    step = spread.over(step, model, keep_gradients=keep_gradients, stages=stages)
    say("finding regions and what they can keep")
    limits = Limits(0.0, time_limit_seconds, gap * step.seconds)
    notes = (batch_note, *target.notes, *step.notes, cache_note(model))
    workload = document.Workload(
        batch=_batch_specs(arguments),
        optimizer=factory.name if factory else None,
        device=target.device.name,
        costs=costs,
        keep_outputs=keep_outputs,
        keep_gradients=keep_gradients,
        max_grad_norm=max_grad_norm,
        autocast=dtype_name(cast_to),
        sharding=spread.kind,
        world_size=spread.world_size,
        wrap=spread.wrap,
        reshard_after_forward=spread.reshard_after_forward,
        param_dtype=dtype_name(spread.precision.param_dtype),
        reduce_dtype=dtype_name(spread.precision.reduce_dtype),
        notes=tuple(filter(None, notes)),
    )
    task = Task.of(step, target, limits, selective, gathered=spread.gathered)
    return Prepared(task, _model(model), workload)


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


def check_types(model: object, batch: object, device: object) -> None:
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
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)
    return document.Model(
        type(model).__name__,
        fingerprint(model),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        dtype_name(dtype),
    )
