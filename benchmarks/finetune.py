"""Fine-tuning with the Trainer of transformers: a plan changes no loss and keeps its budget.

    python benchmarks/finetune.py [--tasks classify lora] [--steps 20] [--share 0.5]

A classifier of BERT-base's size and a Llama of 12 layers with LoRA are trained on made-up data,
without a plan and with a ``MemfitCallback`` whose budget leaves half of what the step adds, or the
least that can be done: the classifier's gradients alone are more than half. Losses and trained
parameters have to be equal to the bit, and the allocator's peak of a step within the budget.
Depends on torch, transformers, accelerate and peft.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks import processes
from benchmarks.measure import peak_seen_by
from benchmarks.report import Table, mib, percent, write_results
from memfit.integrations import MemfitCallback
from memfit.planner import InfeasibleBudget

TASKS = ("classify", "lora")
SETTINGS = 3
HEADERS = (f"{'task':<10}", "precision", "accumulate", "budget MiB", "predicted", "measured",
           "error %", "fits", "equal", "overhead %")  # fmt: skip
# Within a few steps the optimizer has its state and the caches are warm.
_MEASURED_STEP = 3
_EVERYTHING = 2**50
_BATCH = 4
Example = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One training; bytes are above those that are there before a step."""

    losses: list[float]
    digest: str
    """Of the trained parameters' bytes."""
    measured_bytes: int
    predicted_bytes: int = 0
    unplanned_bytes: int = 0
    resident_bytes: int = 0
    overhead: float = 0.0
    minimum_bytes: int = 0
    """The smallest budget, resident bytes included, of a run whose own cannot be kept."""


@dataclass(frozen=True, slots=True)
class Row:
    """A task, trained with and without a plan."""

    task: str
    bf16: bool
    accumulate: int
    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    unplanned_measured_bytes: int
    equal: bool
    overhead: float

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def fits(self) -> bool:
        return self.measured_bytes <= self.budget_bytes

    @property
    def passes(self) -> bool:
        return self.fits and self.equal and abs(self.error) <= 0.01

    def cells(self) -> list[str]:
        """What the table shows."""
        return [
            self.task,
            "bf16" if self.bf16 else "fp32",
            str(self.accumulate),
            mib(self.budget_bytes),
            mib(self.predicted_bytes),
            mib(self.measured_bytes),
            percent(self.error, 3),
            "yes" if self.fits else "NO",
            "yes" if self.equal else "NO",
            percent(self.overhead),
        ]


class Probe(TrainerCallback):
    """Measures one step of a Trainer."""

    def __init__(self) -> None:
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.peak_bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _MEASURED_STEP:
            self._profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _MEASURED_STEP + 1:
            self._profiler.stop()
            self.peak_bytes = peak_seen_by(self._profiler).peak_bytes


def measure(request: processes.Request) -> dict[str, Any]:
    """Trains once in this process."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    model, data = _TASKS[request["task"]](request["quick"])
    probe, budget = Probe(), request["budget"]
    planned = [MemfitCallback(budget)] if budget else []
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory, max_steps=request["steps"], per_device_train_batch_size=_BATCH,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            bf16=request["bf16"], gradient_accumulation_steps=request["accumulate"],
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, callbacks=[*planned, probe])
        try:
            trainer.train()
        except InfeasibleBudget as error:
            return asdict(Run([], "", 0, minimum_bytes=error.minimum_bytes))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    result = Run(losses, digest.hexdigest(), probe.peak_bytes)
    for callback in planned:
        assert callback.plan is not None
        predicted = callback.plan.predicted
        resident = predicted.resident_bytes
        if callback.plan.workload.keep_gradients:
            # Planned as there all along; the Trainer frees them between steps of the optimizer.
            resident -= sum(p.nbytes for p in model.parameters() if p.requires_grad)
        result = replace(
            result,
            predicted_bytes=predicted.peak_bytes - resident,
            unplanned_bytes=predicted.unplanned_peak_bytes - resident,
            resident_bytes=resident,
            overhead=predicted.overhead,
        )
    return asdict(result)


def _classify(quick: bool) -> tuple[nn.Module, Sequence[Example]]:
    """BERT-base with two classes."""
    config = transformers.BertConfig()
    if quick:
        small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
        config.update({**small, "num_attention_heads": 2, "vocab_size": 100})
    model = transformers.BertForSequenceClassification(config)
    return model, _examples(model.config.vocab_size, lambda ids, i: i % 2)


def _lora(quick: bool) -> tuple[nn.Module, Sequence[Example]]:
    """LoRA on all linear layers of a frozen Llama of 12 layers."""
    config = transformers.LlamaConfig(
        hidden_size=64 if quick else 512, intermediate_size=176 if quick else 1376,
        num_hidden_layers=4 if quick else 12, vocab_size=100 if quick else 4096,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    adapters = peft.LoraConfig(
        r=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters)
    return model, _examples(config.vocab_size, lambda ids, i: ids)


def _examples(vocabulary: int, label: Callable[[torch.Tensor, int], Any]) -> Sequence[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, vocabulary, (128, 128), generator=generator)
    return [{"input_ids": ids, "labels": label(ids, i)} for i, ids in enumerate(rows)]


_TASKS: Mapping[str, Callable[[bool], tuple[nn.Module, Sequence[Example]]]] = {
    "classify": _classify,
    "lora": _lora,
}


def compare(
    task: str, bf16: bool, accumulate: int, *, steps: int, share: float, quick: bool = False
) -> Row:
    """Trains with and without a plan into ``share`` of what a step adds, or the least there is."""
    run = partial(_run, {"task": task, "bf16": bf16, "accumulate": accumulate, "quick": quick})
    unplanned = run(steps=steps, budget=None)
    everything = run(steps=1, budget=_EVERYTHING)
    budget = everything.resident_bytes + int(share * everything.unplanned_bytes)
    planned = run(steps=steps, budget=budget)
    if planned.minimum_bytes:
        budget = planned.minimum_bytes
        planned = run(steps=steps, budget=budget)
    return Row(
        task=task,
        bf16=bf16,
        accumulate=accumulate,
        budget_bytes=budget - planned.resident_bytes,
        predicted_bytes=planned.predicted_bytes,
        measured_bytes=planned.measured_bytes,
        unplanned_measured_bytes=unplanned.measured_bytes,
        equal=(planned.losses, planned.digest) == (unplanned.losses, unplanned.digest),
        overhead=planned.overhead,
    )


def _run(which: Mapping[str, Any], **more: Any) -> Run:
    return Run(**processes.alone(__file__, {**which, **more}, threads=2))


def main() -> int:
    arguments = _parse()
    if arguments.alone:
        processes.answer(measure, arguments.alone)
        return 0
    begin = time.perf_counter()
    print(f"{arguments.steps} steps each; MiB above what is there before a step.\n")
    table, rows = Table(HEADERS), []
    for task in arguments.tasks:
        for bf16, accumulate in ((False, 1), (True, 1), (False, 2))[: arguments.settings]:
            how = {name: getattr(arguments, name) for name in ("steps", "share", "quick")}
            rows.append(compare(task, bf16, accumulate, **how))
            table.row(rows[-1].cells())
    failed = sum(not row.passes for row in rows)
    print(f"\n{len(rows)} trainings, {failed} failed.")
    if not arguments.quick and tuple(arguments.tasks) == TASKS and arguments.settings == SETTINGS:
        records = [asdict(r) | {"error": r.error, "passes": r.passes} for r in rows]
        write_results("finetune-cpu", "cpu", records, time.perf_counter() - begin)
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--steps", type=int, default=20, help="of the optimizer")
    parser.add_argument("--share", type=float, default=0.5, help="of what a step adds")
    parser.add_argument(
        "--settings", type=int, default=SETTINGS, metavar="N",
        help="the first N of: float32, bf16 autocast, accumulation over 2 batches",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument(processes.ALONE, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
