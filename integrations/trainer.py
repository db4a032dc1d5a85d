"""``MemfitCallback``: a plan inside the Trainer of transformers, from its own first batch.

The plan is made when the model is first called to train, with what it is called with, so neither
the order of the data nor a generator is touched; a larger batch later is planned anew. Depends on
``plan``, ``apply``, what FSDP2 made of a model, and transformers' callbacks.
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
from memfit.integrations.sharded import Twin, is_sharded, read_sharded
from memfit.planner import InfeasibleBudget, Plan, plan
from memfit.planner.budget import format_bytes
from memfit.planner.caching import caching_modules, without_cache
from memfit.planner.fingerprint import unsharded_class
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
    optimizer, mixed precision, accumulation, clipping and sharding (DDP, FSDP2) are the Trainer's.
    The plan is written to ``memfit_plan.json`` in its output directory and is :attr:`plan` here.
    Raises :class:`ApplyError` beside activation checkpointing of the Trainer, before training, and
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
        self._twin: Twin | None = None
        """Of a model that is going to be sharded."""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse(args)
        _refuse_sharded(kwargs["model"])
        self._twin = Twin(kwargs["model"]) if _fsdp_version(args) else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse(args)
        self.remove()
        self.plan = self.measured_peak_bytes = None
        model = kwargs["model"]
        if self._twin is None:
            _refuse_sharded(model)
        self._training = _Training(self, args, model, kwargs.get("optimizer"), self._twin)

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
        twin: Twin | None,
    ) -> None:
        self._callback = callback
        self._args = args
        self._model = model
        # accelerate wraps the optimizer.
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._twin = twin
        self._applied: AppliedPlan | None = None
        self._elements = 0
        self._steps = 0
        self._listen()

    def _listen(self) -> None:
        # Before FSDP2's own hook, which gathers parameters.
        self._hook = self._model.register_forward_pre_hook(
            self._called, with_kwargs=True, prepend=True
        )

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
        budget = self._callback.budget
        options = {"device": next(self._model.parameters()).device.type} | self._callback.options
        target = find_target(self._model, options["device"])
        own = 0 if budget == "auto" else OWN_BYTES
        model, optimizer, sharding = self._as_planned()
        try:
            return plan(
                model,
                max(1, resolve_budget(budget, target) - own),
                batch,
                optimizer=optimizer,
                keep_gradients=self._args.gradient_accumulation_steps > 1,
                max_grad_norm=self._args.max_grad_norm or None,
                **sharding,
                **options,
            )
        except InfeasibleBudget as error:
            least = error.minimum_bytes + own
            raise InfeasibleBudget(
                f"{error} With the {own} bytes that the Trainer takes beside it: {least} bytes.",
                least,
            ) from error

    def _as_planned(self) -> tuple[nn.Module, torch.optim.Optimizer | None, dict[str, Any]]:
        """The model and its optimizer as ``plan`` takes them, and how they are sharded."""
        model, optimizer, processes = self._model, self._optimizer, self._args.world_size
        sharding = {"sharding": "ddp", "world_size": processes} if processes > 1 else {}
        if self._twin is not None and is_sharded(model):
            twin = self._twin.like(model)
            if optimizer is not None:
                optimizer = self._twin.optimizer(optimizer, model)
            return twin, optimizer, read_sharded(model).options()
        return model, optimizer, sharding

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


def _fsdp_version(args: TrainingArguments) -> int:
    """1 or 2, or 0 without FSDP."""
    if getattr(args, "fsdp", None):
        settings: Any = args.fsdp_config or {}
        return int(settings.get("version", 2))
    return int(os.environ.get("FSDP_VERSION", "1")) if _launched_with("ACCELERATE_USE_FSDP") else 0


def _launched_with(switch: str) -> bool:
    """Whether ``accelerate launch`` switched something on."""
    return os.environ.get(switch, "false").lower() in ("true", "1")


def _refuse(args: TrainingArguments) -> None:
    """What a plan cannot run beside, said before any step."""
    if getattr(args, "deepspeed", None) or _launched_with("ACCELERATE_USE_DEEPSPEED"):
        raise ApplyError(
            "DeepSpeed runs the step in an engine of its own, which is not planned; train with "
            "DDP, with FSDP2 (fsdp=True), or in one process"
        )
    version = _fsdp_version(args)
    if version == 1:
        raise ApplyError(
            "FSDP1 wraps the model in flat parameters, which is not planned; use FSDP2: "
            "fsdp_config={'version': 2}, or accelerate launch --fsdp_version 2"
        )
    if args.torch_compile:
        raise ApplyError(
            "torch_compile=True compiles the model before MemfitCallback sees a batch; drop one of "
            "the two"
        )
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False):
            _refuse_switch(args, name, "checkpoints every layer, which a plan cannot run beside")
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
    _refuse_of_fsdp(args, version)


def _refuse_switch(args: TrainingArguments, name: str, reason: str) -> None:
    raise ApplyError(
        f"{name}=True in {type(args).__name__} {reason}; pass {name}=False and keep "
        "MemfitCallback, or the other way round"
    )


def _refuse_sharded(model: nn.Module) -> None:
    if is_sharded(model):
        raise ApplyError(
            f"{unsharded_class(model).__name__} was sharded before MemfitCallback saw it; load it "
            "whole, and pass the callback when the Trainer is made: Trainer(..., callbacks=[...])"
        )


def _refuse_of_fsdp(args: TrainingArguments, version: int) -> None:
    settings: Any = getattr(args, "fsdp_config", None) or {}
    for where, switch in (
        ("fsdp_config's activation_checkpointing", settings.get("activation_checkpointing")),
        (
            "accelerate's --fsdp_activation_checkpointing",
            version and _launched_with("FSDP_ACTIVATION_CHECKPOINTING"),
        ),
    ):
        if switch:
            raise ApplyError(
                f"{where} checkpoints every layer, which a plan cannot run beside; drop it and "
                "keep MemfitCallback, or the other way round"
            )
    if not version:
        return
    if settings.get("cpu_offload") or _launched_with("FSDP_OFFLOAD_PARAMS"):
        raise ApplyError(
            "FSDP2 with its parameters on the CPU (cpu_offload) is not planned; drop one of the two"
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.bf16 or args.fp16 or launched != "no":
        raise ApplyError(
            "with bf16 or fp16 accelerate has FSDP2 cast outputs under autocast, which is not "
            "planned; load the model in bfloat16 and leave bf16 and fp16 out"
        )
    accelerator: Any = args.accelerator_config
    accumulation = accelerator.gradient_accumulation_kwargs or {}
    if args.gradient_accumulation_steps > 1 and not accumulation.get("sync_each_batch"):
        raise ApplyError(
            "FSDP2 keeps whole gradients between the batches that it accumulates, which is not "
            "planned; pass accelerator_config={'gradient_accumulation_kwargs': "
            "{'sync_each_batch': True}}, by which every process keeps its shards alone"
        )
