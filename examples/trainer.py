"""Fine-tunes a small Llama with LoRA in the Trainer of transformers, planned into a budget.

    python examples/trainer.py [--budget 20MiB] [--without]
    torchrun --nproc-per-node 2 examples/trainer.py
    accelerate launch --multi_gpu --num_processes 2 examples/trainer.py

``--without`` trains the same without a plan: the losses are the same. ``--multi_gpu`` is what makes
accelerate start several processes, without a GPU too. Needs accelerate and peft.
"""

import argparse
import logging
import os
import tempfile

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from memfit.integrations import MemfitCallback


def model_with_adapters() -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
            vocab_size=512,
        )
    )  # fmt: skip
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))


def made_up_text(rows: int, length: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="20MiB", help="peak of all memory of a step")
    parser.add_argument("--without", action="store_true", help="train without a plan")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the callback says what it did
    on_cpu = not torch.cuda.is_available()
    planned: list[TrainerCallback] = []
    if not options.without:
        planned.append(MemfitCallback(options.budget))
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory, max_steps=5, per_device_train_batch_size=4, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=on_cpu,
            ddp_backend="gloo" if on_cpu and "LOCAL_RANK" in os.environ else None,
        )  # fmt: skip
        trainer = Trainer(
            model_with_adapters(), args, train_dataset=made_up_text(64, 128), callbacks=planned
        )
        trainer.train()
        trainer.accelerator.end_training()  # without it gloo's threads may abort the exit
    if args.should_log:
        print("losses", *(e["loss"] for e in trainer.state.log_history if "loss" in e))


if __name__ == "__main__":
    main()
