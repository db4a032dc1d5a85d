"""A training step that can be repeated exactly: same seed, same weights, gradients None before it.

Depends on torch, on the measures, on the workloads and on the planner.
"""

import gc
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property, partial
from typing import Any

import numpy
import torch
from torch import nn

from benchmarks.measure import (
    Contestant,
    Outcome,
    Peak,
    Timing,
    measure_peak,
    outcome_of,
    time_steps,
)
from benchmarks.workloads import Workload, make
from memfit.planner import Plan, plan
from memfit.planner.document import Predicted
from memfit.planner.losses import loss_of
from memfit.planner.shadows import tensors_in

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
OPTIMIZERS = tuple(_OPTIMIZERS)


class Trainer:
    """Runs steps of one model on one batch."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        optimizer: str | None = None,
        device: str = "cpu",
        autocast: str | None = None,
        accumulate: bool = False,
    ) -> None:
        self.model = model
        self.batch = batch
        self.optimizer: torch.optim.Optimizer | None = None
        if optimizer is not None:
            self.optimizer = _OPTIMIZERS[optimizer](model.parameters(), lr=0.0)
        self.device = device
        self.accumulate = accumulate
        self.autocast: torch.dtype | None = getattr(torch, autocast) if autocast else None

    @classmethod
    def of(cls, workload: Workload) -> "Trainer":
        """Builds the workload."""
        model, batch = make(workload)
        return cls(
            model,
            batch,
            workload.optimizer,
            workload.device,
            workload.autocast,
            workload.accumulate,
        )

    @classmethod
    def shared(cls, workload: Workload) -> "Trainer":
        """The trainer of the last workload asked for, if it is this one, else a new one."""
        if workload not in _shared:
            _shared.clear()
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where there is no GPU
            _shared[workload] = cls.of(workload)
        return _shared[workload]

    def plan(self, budget_bytes: int, **options: Any) -> Plan:
        """A plan of this step; ``options`` are more arguments of memfit's ``plan``."""
        step: dict[str, Any] = {
            "optimizer": self.optimizer,
            "autocast": self.autocast,
            "keep_gradients": self.accumulate,
        }
        return plan(self.model, budget_bytes, self.batch, **step | options)

    @cached_property
    def unplanned(self) -> Predicted:
        """What is predicted of the step as it is."""
        return self.plan(2**60).predicted

    def before(self, seed: int = 0) -> None:
        """What belongs to no step: the seed, and that there are no gradients but one step's."""
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        if self.accumulate:
            self.backward()

    def backward(self) -> torch.Tensor:
        """Forward and backward. The outputs die before the backward, as in the usual loop."""
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            outputs = self.model(**self.batch)
        loss, _ = loss_of(outputs, self.model)
        del outputs
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> torch.Tensor:
        """The whole step: forward, backward, and the optimizer's where there is one."""
        loss = self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss

    def held_bytes(self) -> int:
        """Parameters, buffers, optimizer state and batch, counted tensor by tensor.

        With the gradients that a step adds to.
        """
        tensors = [*self.model.parameters(), *self.model.buffers(), *tensors_in(self.batch)]
        if self.accumulate:
            tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.optimizer is not None:
            states = self.optimizer.state.values()
            tensors += [v for s in states for v in s.values() if torch.is_tensor(v)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def gradient_bytes(self) -> int:
        """What the gradients take once a step has made them all."""
        return sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def outcome(self) -> Outcome:
        """Loss and gradients of a forward and backward; parameters stay as they are."""
        self.before()
        return outcome_of(self.model, self.backward())

    def peak(self) -> Peak:
        """Measures a step; one before it has allocated the optimizer's state."""
        return measure_peak(self.step, before=self.before, device=self.device)


_shared: dict[Workload, Trainer] = {}


def forget_shared() -> None:
    """Lets go of the shared trainer, which a failed measurement may have left half changed."""
    _shared.clear()


Way = Callable[[], AbstractContextManager[object]]


def time_ways(trainer: Trainer, ways: Mapping[str, Way], rounds: int) -> dict[str, Timing]:
    """Steps of one model that is trained in several ways, which take turns.

    What a way enters is changed outside of the clock. Each has had a step before the one that is
    timed: plans record in their first.
    """
    with ExitStack() as entered:

        def enter(name: str) -> None:
            entered.close()
            entered.enter_context(ways[name]())
            trainer.before()
            trainer.step()
            trainer.before()

        contestants = {name: Contestant(trainer.step, partial(enter, name)) for name in ways}
        return time_steps(contestants, rounds=rounds, warmup=0, device=trainer.device)


def checkpoint_layers(
    model: nn.Module,
    every_n_layers: int = 1,
    context_fn: Callable[[], Any] | None = None,
    **more: bool,
) -> None:
    """Switches transformers' own checkpointing on; ``context_fn`` is torch's for selective ones.

    ``more`` is ``offload``, where transformers has that.
    """
    options = {"use_reentrant": False} | ({"context_fn": context_fn} if context_fn else {})
    checkpointing(model, "enable")(options, every_n_layers=every_n_layers, **more)


def keep_layers(model: nn.Module) -> None:
    """Switches transformers' own checkpointing off, and its hook on the embeddings with it."""
    checkpointing(model, "disable")()
    model.disable_input_require_grads()  # type: ignore[operator]


def checkpointing(model: nn.Module | type[nn.Module], switch: str) -> Callable[..., None]:
    """A switch of a model or of its class, by its name.

    Before transformers 5.18 or so that began with ``gradient``.
    """
    now, before = (f"{kind}_checkpointing_{switch}" for kind in ("activation", "gradient"))
    function: Callable[..., None] = getattr(model, now if hasattr(model, now) else before)
    return function
