"""The callback of the Trainer: it plans from the first batch and changes nothing in training."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from memfit.integrations import ApplyError, MemfitCallback
from memfit.integrations.forwards import MemfitWarning
from memfit.integrations.trainer import OWN_BYTES, PLAN_FILE
from memfit.planner import InfeasibleBudget, Plan
from memfit.planner.checkpointing import is_planned

# Of libraries that the Trainer uses, about themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def classifier() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    settings = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    return peft.get_peft_model(model, settings)


def examples(causal: bool = False, lengths: tuple[int, ...] = (16,)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(5, 95, (lengths[i * len(lengths) // 32],), generator=generator)
        for i in range(32)
    ]
    return [{"input_ids": row, "labels": row if causal else i % 2} for i, row in enumerate(rows)]


def train(
    model: nn.Module,
    directory: Path,
    callbacks: list[TrainerCallback],
    data: list[dict[str, Any]] | None = None,
    *,
    resume: bool = False,
    **options: Any,
) -> list[float]:
    """Losses of four steps, or so many as ``max_steps`` says."""
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "no"} | options
    args = TrainingArguments(
        str(directory), per_device_train_batch_size=4, logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=data or examples(), eval_dataset=examples()[:4],
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def smallest_budget(model: nn.Module, directory: Path, **options: Any) -> int:
    with pytest.raises(InfeasibleBudget) as error:
        train(model, directory, [MemfitCallback(1)], **options)
    return error.value.minimum_bytes


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    others = other.state_dict()
    assert all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1, "max_grad_norm": 0.0},
    ],
    ids=["float32", "bf16", "accumulation", "evaluation"],
)
def test_what_is_learned_stays_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, planned = classifier(), classifier()
    losses = train(plain, tmp_path / "plain", [], **options)
    budget = smallest_budget(classifier(), tmp_path, **options)
    callback = MemfitCallback(budget)
    assert train(planned, tmp_path / "planned", [callback], **options) == losses
    assert_same_weights(plain, planned)
    made = callback.plan
    assert made is not None and any(r.action != "keep" for r in made.regions)
    assert made.predicted.peak_bytes <= budget - OWN_BYTES
    assert made.workload.optimizer == "AdamW"
    assert made.workload.keep_gradients == (options.get("gradient_accumulation_steps", 1) > 1)
    assert made.workload.max_grad_norm == (None if "max_grad_norm" in options else 1.0)
    assert Plan.load(tmp_path / "planned" / PLAN_FILE) == made
    assert not any("forward" in vars(m) for m in planned.modules() if m is not planned)


def test_adapters_learn_the_same_on_frozen_weights(tmp_path: Path) -> None:
    data = examples(causal=True)
    before, plain, planned = adapted(), adapted(), adapted()
    losses = train(plain, tmp_path, [], data)
    callback = MemfitCallback(smallest_budget(adapted(), tmp_path, data=data))
    assert train(planned, tmp_path, [callback], data) == losses
    assert_same_weights(plain, planned)
    start = before.state_dict()
    moved = {n for n, tensor in planned.state_dict().items() if not torch.equal(tensor, start[n])}
    adapters = {n for n in start if "lora_" in n}
    assert moved == adapters
    assert callback.plan is not None
    assert callback.plan.model.trainable_parameters == sum(start[n].numel() for n in adapters)


def test_a_larger_batch_is_planned_anew_and_a_smaller_one_is_not(tmp_path: Path) -> None:
    plans = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            plans.append(callback.plan)

    data = examples(lengths=(8, 16, 12, 24))
    options: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_steps": 8}
    plain, planned = classifier(), classifier()
    losses = train(plain, tmp_path, [], data, **options)
    callback = MemfitCallback(
        smallest_budget(classifier(), tmp_path, data=examples(lengths=(24,)), **options)
    )
    assert train(planned, tmp_path, [callback, Watch()], data, **options) == losses
    assert_same_weights(plain, planned)
    lengths = [p.workload.batch["input_ids"].shape[1] for p in plans if p is not None]
    assert lengths == [8, 8, 16, 16, 16, 16, 24, 24]


class Stops(TrainerCallback):
    """Ends a run after two steps, as a job that is cut off."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_training_is_resumed_under_a_plan(tmp_path: Path) -> None:
    plain, planned = classifier(), classifier()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    losses = train(plain, tmp_path / "plain", [], **options)
    budget = smallest_budget(classifier(), tmp_path)
    train(planned, tmp_path / "planned", [MemfitCallback(budget), Stops()], **options)
    again = classifier()
    resumed = train(
        again, tmp_path / "planned", [MemfitCallback(budget)], resume=True, **options
    )  # fmt: skip
    assert resumed == losses
    assert_same_weights(plain, again)
    saved = json.loads((tmp_path / "planned" / "checkpoint-4" / "config.json").read_text())
    assert saved["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "activation_checkpointing",
            "activation_checkpointing=True in TrainingArguments checkpoints every layer",
        ),
        ("torch_compile", "torch_compile=True compiles the model before"),
        ("deepspeed", "train with DDP, with FSDP2"),
    ],
)
def test_what_a_plan_cannot_run_beside_is_refused_before_it_trains(
    tmp_path: Path, option: str, message: str
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    setattr(args, option, True)
    assert_refused(args, message)


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({"version": 1}, 1, "use FSDP2: fsdp_config={'version': 2}"),
        ({"activation_checkpointing": True}, 1, "fsdp_config's activation_checkpointing checkp"),
        ({"cpu_offload": True}, 1, "parameters on the CPU"),
        ({}, 2, "keeps whole gradients .*'sync_each_batch': True"),
    ],
)
def test_what_is_not_planned_of_fsdp_is_refused(
    tmp_path: Path, settings: dict[str, Any], steps: int, message: str
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, gradient_accumulation_steps=steps)
    args.fsdp, args.fsdp_config = "full_shard", settings
    assert_refused(args, message)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "accelerate launch --fsdp_version 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--fsdp_activation_checkpointing"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "parameters on the CPU"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "load the model in bfloat16"),
    ],
)
def test_what_accelerate_launch_says_of_fsdp_counts(
    tmp_path: Path, variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | variables
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert_refused(args, message)


def assert_refused(args: TrainingArguments, message: str) -> None:
    with pytest.raises(ApplyError, match=message):
        MemfitCallback("1GiB").on_init_end(
            args, TrainerState(), TrainerControl(), model=classifier()
        )


def test_a_trainer_with_its_own_checkpointing_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ApplyError, match="pass activation_checkpointing=False and keep"):
        train(classifier(), tmp_path, [MemfitCallback("1GiB")], activation_checkpointing=True)


def test_a_loss_outside_the_model_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ApplyError, match=r"label_smoothing_factor=0.1 .* outside the model"):
        train(classifier(), tmp_path, [MemfitCallback("1GiB")], label_smoothing_factor=0.1)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels)

    args = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        classifier(), args, train_dataset=examples(), callbacks=[MemfitCallback("1GiB")],
        compute_loss_func=loss,
    )  # fmt: skip
    with pytest.warns(MemfitWarning, match="the Trainer computes the loss of BertFor.* itself"):
        trainer.train()


def test_what_the_trainer_decides_is_no_option() -> None:
    with pytest.raises(TypeError, match="batch, optimizer of a plan come from the Trainer"):
        MemfitCallback("1GiB", optimizer="sgd", batch=None)


def test_a_failure_in_training_leaves_no_plan_for_the_next_run(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = classifier()
    callback = MemfitCallback("1GiB")
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, [callback, Fails()])
    assert is_planned(model)
    assert len(train(model, tmp_path, [callback])) == 4
    assert not is_planned(model)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, [callback, Fails()])
    callback.remove()
    assert not is_planned(model)
