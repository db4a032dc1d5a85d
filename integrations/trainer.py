"""``MemfitCallback``: a plan inside the Trainer of transformers, from its own first batch.

The plan is made when the model is first called to train, with what it is called with, so neither
the order of the data nor a generator is touched; a larger batch later is planned anew. Depends on
``plan``, ``apply`` and transformers' callbacks.
"""

import inspect
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memfit.integrations.applying import AppliedPlan, ApplyError, apply
from memfit.integrations.forwards import MemfitWarning
from memfit.planner import InfeasibleBudget, Plan, plan
from memfit.planner.budget import format_bytes
from memfit.planner.caching import caching_modules, without_cache
from memfit.planner.losses import NO_LOSS
from memfit.planner.shadows import tensors_in
from memfit.planner.target import find_target, resolve_budget

PLAN_FILE = "memfit_plan.json"
_DECIDED = frozenset(
    {
        *("batch", "optimizer", "autocast", "keep_gradients", "max_grad_norm", "progress"),
        *("sharding", "world_size", "wrap", "reshard_after_forward"),
    }
)
# Losses, norms and counts that the Trainer holds beside a step, each an allocation on a GPU.
OWN_BYTES = 16 * 512
_logger = logging.getLogger(__name__)


class MemfitCallback(TrainerCallback):
    """Plans and applies when training begins, and says how true the plan was.

        Trainer(model, args, train_dataset=data, callbacks=[MemfitCallback("20GiB")])

    ``budget`` is the peak of all device memory, as for :func:`memfit.planner.plan`, of which 8 KiB
    are for the Trainer's own losses and norms; the other options are those of ``plan``. Batch,
    optimizer, mixed precision, accumulation and clipping are the Trainer's. The plan is written to
    ``memfit_plan.json`` in its output directory and is :attr:`plan` here. Raises
    :class:`ApplyError` beside activation checkpointing of the Trainer, before training, and
    :class:`InfeasibleBudget` for a batch that cannot be trained within the budget.
    """

    def __init__(self, budget: int | str, **options: Any) -> None:
        if taken := _DECIDED & options.keys():
            raise TypeError(
                f"{', '.join(sorted(taken))} of a plan come from the Trainer; leave out"
            )
        self.budget = budget
        self.options = options
        self.plan: Plan | None = None
        """What is applied, once the first batch has come."""
        self.measured_peak_bytes: int | None = None
        """Peak of the step after the first planned one; None where no GPU counts it."""
        self._training: _Training | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse(args)
        self.remove()
        self.plan = self.measured_peak_bytes = None
        self._training = _Training(self, args, kwargs["model"], kwargs.get("optimizer"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._training is not None and self.plan is not None:
            self._training.step_ends()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Leaves the model as it was. Training does so at its end, but not if it is interrupted."""
        if self._training is not None:
            self._training.end()
        self._training = None


class _Training:
    """One run of a Trainer: plans when the model is called, again for a larger batch."""

    def __init__(
        self,
        callback: MemfitCallback,
        args: TrainingArguments,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._callback = callback
        self._args = args
        self._model = model
        # accelerate wraps the optimizer.
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._applied: AppliedPlan | None = None
        self._elements = 0
        self._steps = 0
        self._listen()

    def _listen(self) -> None:
        self._hook = self._model.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        elements = sum(t.numel() for t in tensors_in((args, kwargs)))
        if not (model.training and torch.is_grad_enabled()) or elements <= self._elements:
            return None
        self._elements = elements
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._plan(dict(zip(names, args, strict=False)) | kwargs)
        # The plan's own hook on this module comes too late for this call.
        return without_cache(model, args, kwargs) if model in caching_modules(model) else None

    def _plan(self, batch: dict[str, Any]) -> None:
        self.end()  # a plan is made for a model as it was
        made = self._within_budget(batch)
        self._applied = apply(made, self._model)
        self._listen()
        self._steps = 0
        self._callback.plan = made
        if any(NO_LOSS in note for note in made.workload.notes):
            warnings.warn(
                f"the Trainer computes the loss of {type(self._model).__name__} itself, which the "
                "plan does not cover: the step can peak above the budget. Leave room for it, or "
                "return the loss from the model",
                MemfitWarning,
                stacklevel=2,
            )
        predicted = made.predicted
        _logger.info(
            "planned into %s: peak %s at the %s, %.1f %% recomputed; unplanned %s",
            format_bytes(made.budget_bytes),
            format_bytes(predicted.peak_bytes),
            predicted.peak_at,
            100 * predicted.overhead,
            format_bytes(predicted.unplanned_peak_bytes),
        )
        if self._args.should_save:
            directory = Path(self._args.output_dir or ".")
            directory.mkdir(parents=True, exist_ok=True)
            made.save(directory / PLAN_FILE)

    def _within_budget(self, batch: dict[str, Any]) -> Plan:
        budget, options = self._callback.budget, self._callback.options
        target = find_target(self._model, options.get("device"))
        own = 0 if budget == "auto" else OWN_BYTES
        processes = self._args.world_size
        try:
            return plan(
                self._model,
                max(1, resolve_budget(budget, target) - own),
                batch,
                optimizer=self._optimizer,
                keep_gradients=self._args.gradient_accumulation_steps > 1,
                max_grad_norm=self._args.max_grad_norm or None,
                sharding="ddp" if processes > 1 else None,
                world_size=processes,
                **options,
            )
        except InfeasibleBudget as error:
            least = error.minimum_bytes + own
            raise InfeasibleBudget(
                f"{error} With the {own} bytes that the Trainer takes beside it: {least} bytes.",
                least,
            ) from error

    def step_ends(self) -> None:
        """The step after the first planned one is measured: the first may still allocate state."""
        self._steps += 1
        device = next(self._model.parameters()).device
        if device.type != "cuda" or self._steps > 2 or self._callback.plan is None:
            return
        if self._steps == 1:
            torch.cuda.reset_peak_memory_stats(device)
            return
        peak = torch.cuda.max_memory_allocated(device)
        predicted = self._callback.plan.predicted.peak_bytes
        self._callback.measured_peak_bytes = peak
        _logger.info(
            "measured peak %s, %+.2f %% of the predicted %s",
            format_bytes(peak),
            100 * (peak / predicted - 1),
            format_bytes(predicted),
        )

    def end(self) -> None:
        """Leaves the model as it was."""
        self._hook.remove()
        if self._applied is not None:
            self._applied.remove()
            self._applied = None


def _refuse(args: TrainingArguments) -> None:
    """What a plan cannot run beside, said before any step."""
    for what, engine in (("FSDP", "fsdp"), ("DeepSpeed", "deepspeed")):
        launched = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"
        if getattr(args, engine, None) or launched:
            raise ApplyError(
                f"{what} shards the model before MemfitCallback sees it; train with DDP or in one "
                "process, or in a loop of your own with fully_shard() and "
                "plan(model, budget, sharding='fsdp2', world_size=...)"
            )
    if args.torch_compile:
        raise ApplyError(
            "torch_compile=True compiles the model before MemfitCallback sees a batch; drop one of "
            "the two"
        )
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False):
            _refuse_switch(args, name, "checkpoints every layer, which a plan cannot run beside")
    settings = getattr(args, "fsdp_config", None) or {}
    if settings.get("activation_checkpointing"):
        raise ApplyError(
            "fsdp_config's activation_checkpointing checkpoints every layer, which a plan cannot "
            "run beside; drop it and keep MemfitCallback, or the other way round"
        )
    if getattr(args, "activation_offloading", False):  # TRL's
        _refuse_switch(
            args, "activation_offloading", "takes activations off the device that a plan counts"
        )
    if args.label_smoothing_factor:
        raise ApplyError(
            f"label_smoothing_factor={args.label_smoothing_factor} makes the Trainer compute the "
            "loss from the logits, outside the model and so outside the plan; set it to 0, or "
            "smooth in the model's own loss"
        )


def _refuse_switch(args: TrainingArguments, name: str, reason: str) -> None:
    raise ApplyError(
        f"{name}=True in {type(args).__name__} {reason}; pass {name}=False and keep "
        "MemfitCallback, or the other way round"
    )
