"""Trains BERT in 60 % of the memory that it needs, and shows what that costs.

    python benchmarks/demo.py [--model PATH_OR_ID] [--share 0.6] [--steps 2]

Real AdamW steps, with dropout, from the same weights and seeds, in three ways: as it is, with all
layers recomputed (transformers' own checkpointing), and by memfit's plan. Memory and losses are
measured in a process for each way, times in turns in one process. Exit code 1
if the plan is over its budget or any loss differs.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from benchmarks import processes
from benchmarks.measure import measure_peak
from benchmarks.report import Table, percent
from benchmarks.training import Trainer, checkpoint_layers, keep_layers
from memfit.integrations import apply
from memfit.planner import InfeasibleBudget, Plan, plan

GIB = 2**30
VARIANTS = ("unplanned", "checkpointed", "planned")
OPTIMIZER = "adamw"
ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Run:
    """What one way of training measured."""

    losses: list[float]
    peak_bytes: int


def main() -> int:
    arguments = _parse()
    if arguments.alone:
        processes.answer(_answer, arguments.alone)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        made = _make_plan(arguments)
        made.save(path)
        return _compare(arguments, made, path)


def _make_plan(arguments: argparse.Namespace) -> Plan:
    trainer = make_trainer(vars(arguments))
    begin = time.perf_counter()
    plan_into = partial(plan, trainer.model, batch=trainer.batch, optimizer=OPTIMIZER)
    needed = plan_into(2**60).predicted.unplanned_peak_bytes
    try:
        made = plan_into(int(arguments.share * needed))
    except InfeasibleBudget as error:
        made = plan_into(error.minimum_bytes)
        print(f"{arguments.share:.0%} cannot be done; this is the least that can:")
    size, length = trainer.batch["input_ids"].shape
    print(
        f"{type(trainer.model).__name__}, {made.model.parameters / 1e6:.0f} M parameters, AdamW, "
        f"dropout, {size} x {length} tokens.\n"
        f"A step needs {needed / GIB:.2f} GiB; planned into {made.budget_bytes / GIB:.2f} GiB "
        f"({made.budget_bytes / needed:.0%}) in {time.perf_counter() - begin:.1f} s: "
        f"{_recomputed(made)} of {len(made.regions)} layers are recomputed.\n"
        f"Now training {arguments.steps} steps in each of three ways, a minute or two ...\n",
        flush=True,
    )
    return made


def _compare(arguments: argparse.Namespace, made: Plan, path: Path) -> int:
    """Trains in the three ways, prints the table, and judges."""
    peaks = {b.name: b.peak_bytes for b in made.baselines}
    planned_bytes = made.predicted.peak_bytes
    predicted = dict(zip(VARIANTS, (peaks["none"], peaks["full"], planned_bytes), strict=True))
    table = Table(
        ["variant     ", "budget GiB", "predicted", "measured", "CPU s/step", "+%", "losses"]
    )
    threads, shared = os.cpu_count() or 1, vars(arguments) | {"plan": str(path)}
    runs: dict[str, Run] = {}
    seconds = processes.alone(__file__, shared | {"race": ROUNDS}, threads=threads)
    for name in VARIANTS:
        request = shared | {"variant": name}
        runs[name] = run = Run(**processes.alone(__file__, request, threads=threads))
        table.row(
            [
                name,
                f"{made.budget_bytes / GIB:.3f}" if name == "planned" else "",
                f"{predicted[name] / GIB:.3f}",
                f"{run.peak_bytes / GIB:.3f}",
                f"{seconds[name]:.2f}",
                percent(seconds[name] / seconds["unplanned"] - 1, 0),
                "equal" if run.losses == runs["unplanned"].losses else "DIFFER",
            ]
        )
    fits = runs["planned"].peak_bytes <= made.budget_bytes
    equal = all(run.losses == runs["unplanned"].losses for run in runs.values())
    print(
        "\nPeaks are all memory of a step: parameters, gradients, optimizer state, activations.\n"
        "predicted: by memfit, before anything ran. measured: by the allocator's own events.\n"
        f"losses: of {arguments.steps} steps, to the bit. "
        f"CPU s/step: best of {ROUNDS} rounds in which the three take turns.\n"
        f"The plan {'keeps' if fits else 'BREAKS'} its budget."
    )
    return 0 if fits and equal else 1


def _answer(request: processes.Request) -> dict[str, Any]:
    return race(request) if "race" in request else measure(request)


def measure(request: processes.Request) -> dict[str, Any]:
    """Trains in one way. The first step also allocates; the allocator is watched in the last."""
    trainer = make_trainer(request)
    losses: list[float] = []

    def step() -> None:
        losses.append(trainer.step().item())

    _switch_on(request["variant"], request, trainer)
    for seed in range(request["steps"] - 1):
        trainer.before(seed)
        step()
    peak = measure_peak(step, before=partial(trainer.before, request["steps"]), warmup=0)
    return {"losses": losses, "peak_bytes": trainer.held_bytes() + peak.peak_bytes}


def race(request: processes.Request) -> dict[str, Any]:
    """Best CPU seconds of a step in each way; the ways take turns with one model.

    A plan records in its first forward, so that each way runs one before the clock starts.
    """
    trainer = make_trainer(request)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(request["race"]):
        for name in VARIANTS:
            switch_off = _switch_on(name, request, trainer)
            trainer.model(**trainer.batch)
            trainer.before(turn)
            begin = time.process_time()
            trainer.step()
            seconds[name].append(time.process_time() - begin)
            switch_off()
    return {name: min(taken) for name, taken in seconds.items()}


def _switch_on(variant: str, request: processes.Request, trainer: Trainer) -> Callable[[], object]:
    """Makes the model train in one way; returns what undoes it."""
    if variant == "checkpointed":
        checkpoint_layers(trainer.model, 1)
        return partial(keep_layers, trainer.model)
    if variant == "planned":
        return apply(Plan.load(request["plan"]), trainer.model).remove
    return lambda: None


def make_trainer(options: processes.Request) -> Trainer:
    """BERT with random weights, or the model that was asked for, and a batch of random tokens."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForSequenceClassification
    if options["model"] is None:
        model = auto.from_config(transformers.AutoConfig.for_model("bert"))
    else:
        model = auto.from_pretrained(options["model"])
    shape = (options["batch_size"], options["length"])
    ids = torch.randint(5, model.config.vocab_size, shape)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.arange(options["batch_size"]) % model.config.num_labels,
    }
    return Trainer(model.train(), batch, OPTIMIZER)


def _recomputed(made: Plan) -> int:
    return sum(region.action != "keep" for region in made.regions)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="directory or hub id; default: BERT base, random weights")
    parser.add_argument("--share", type=float, default=0.6, help="of what the step needs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2, help="at least 2")
    parser.add_argument(processes.ALONE, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, not {arguments.steps}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
