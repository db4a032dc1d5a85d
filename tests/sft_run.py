"""An ``SFTTrainer`` of TRL on a Llama of a few layers, for ``test_trl``.

    python tests/sft_run.py

Trains without a plan and with one into the smallest budget, and prints a JSON line with what each
learned, and what the plan predicted and the allocator saw. Runs in a process of its own, since the
allocator's events can be read once in each.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.finetune import Probe
from memfit.integrations import MemfitCallback
from memfit.planner import InfeasibleBudget

WORDS = 97


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 3, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = [*(f"w{i}" for i in range(WORDS)), *special.values()]
    words = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)  # type: ignore[no-untyped-call]


def trainer(
    model: transformers.PreTrainedModel,
    callbacks: Sequence[TrainerCallback],
    *,
    lora: Any = None,
    **options: Any,
) -> SFTTrainer:
    """On sequences that are token ids already; ``options`` are those of ``SFTConfig``."""
    os.environ["CI"] = "1"  # else it tells its makers of the run
    rows = [{"input_ids": [(7 * i + 3 * j) % WORDS for j in range(128)]} for i in range(16)]
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": 4, "per_device_train_batch_size": 4,
        "logging_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no",
    }  # fmt: skip
    return SFTTrainer(
        model,
        SFTConfig(**settings | options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        peft_config=lora,
    )


def train(
    callbacks: Sequence[TrainerCallback], **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of all steps, and the weights that they lead to."""
    made = trainer(llama(), callbacks, activation_checkpointing=False, **options)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return losses, made.accelerator.unwrap_model(made.model).state_dict()


def smallest_budget(**options: Any) -> int:
    try:
        train([MemfitCallback(1, costs="roofline")], **options)
    except InfeasibleBudget as error:
        return error.minimum_bytes
    raise AssertionError("a step fits into one byte")


def main() -> None:
    torch.set_num_threads(1)
    losses, weights = train([])
    budget = smallest_budget()
    callback, probe = MemfitCallback(budget, costs="roofline"), Probe()
    planned, learned = train([callback, probe])
    assert callback.plan is not None
    predicted = callback.plan.predicted
    print(
        json.dumps(
            {
                "same": planned == losses
                and all(torch.equal(t, learned[name]) for name, t in weights.items()),
                "actions": [region.action for region in callback.plan.regions],
                "budget": budget,
                "peak": predicted.peak_bytes,
                "unplanned": predicted.unplanned_peak_bytes,
                "measured": predicted.resident_bytes + probe.peak_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
