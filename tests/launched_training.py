"""A process of ``test_launching``: the Trainer trains without a plan, then with one.

    accelerate launch --multi_gpu --num_processes 2 tests/launched_training.py MODEL [OPTIONS]

``OPTIONS`` are more ``TrainingArguments``, as JSON. With ``fsdp`` among them accelerate is told
that the processes are for GPUs: on a CPU it takes FSDP for DDP. Prints a JSON line: whether losses
and weights are equal to the bit, and what was predicted and measured. Runs in a process of its own,
since the allocator's events can be read once in each.
"""

import copy
import json
import os
import sys
import tempfile
from typing import Any

import torch
import transformers
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.finetune import Probe
from memfit.integrations import MemfitCallback
from memfit.planner import InfeasibleBudget
from tests.process_step import bert, let_go_at_once, llama, local, lora

STEPS = 4
OPTIONS: dict[str, Any] = json.loads(sys.argv[2]) if sys.argv[2:] else {}


def take_cpus_for_gpus() -> None:
    """Of which accelerate alone makes FSDP."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def train(model: nn.Module, data: Any, *callbacks: TrainerCallback) -> list[float]:
    """The losses of a few steps."""
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory, max_steps=STEPS, per_device_train_batch_size=4, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True,
            ddp_broadcast_buffers=False,  # gloo's threads may free them, which no profiler sees
            use_cpu="fsdp" not in OPTIONS, **copy.deepcopy(OPTIONS),
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, callbacks=[*callbacks])
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return {"bert": bert, "llama": llama, "lora": lora}[sys.argv[1]]()[0]


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    rows = torch.randint(0, 1000, (32, 64), generator=torch.Generator().manual_seed(0))
    labels = [i % 2 for i in range(len(rows))] if sys.argv[1] == "bert" else rows
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    if "fsdp" in OPTIONS:
        take_cpus_for_gpus()
    let_go_at_once()
    plain, planned = new_model(), new_model()
    losses = train(plain, data)
    try:
        train(new_model(), data, MemfitCallback(1))
    except InfeasibleBudget as error:
        budget = error.minimum_bytes
    callback, probe = MemfitCallback(budget), Probe()
    again = train(planned, data, callback, probe)
    assert callback.plan is not None
    predicted = callback.plan.predicted
    pairs = zip(plain.parameters(), planned.parameters(), strict=True)
    report = {
        "equal": again == losses and all(torch.equal(local(p), local(q)) for p, q in pairs),
        "steps": len(losses),
        "sharding": callback.plan.workload.sharding,
        "wrap": callback.plan.workload.wrap,
        "actions": sorted({region.action for region in callback.plan.regions}),
        "predicted_bytes": predicted.peak_bytes - predicted.resident_bytes,
        "measured_bytes": probe.peak_bytes,
        "allowed_bytes": budget - predicted.resident_bytes,
    }
    sys.stdout.write(json.dumps(report) + "\n")  # in one piece, beside the other process's
    sys.stdout.flush()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
