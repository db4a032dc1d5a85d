"""Step time against transformers' own checkpointing, at the very same peak.

    python benchmarks/frontier.py [--models gpt2 t5] [--every 1 2] [--rounds 9] [--quick]

For every model and k, transformers' ``activation_checkpointing_enable(every_n_layers=k)`` is
measured in a process of its own, memfit plans into exactly that peak, and the unplanned step,
transformers' and memfit's take turns in another process, with one thread. Exit code 1 if memfit is
slower than transformers by more than 3 points of the unplanned step anywhere.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import processes
from benchmarks.measure import Contestant, time_steps
from benchmarks.report import Table, mib, percent, write_results
from benchmarks.training import Trainer, checkpoint_layers, count_checkpointed, keep_layers
from benchmarks.workloads import ATTENTIONS, MODELS, Workload
from memfit.integrations import AppliedPlan, apply
from memfit.planner import InfeasibleBudget, Plan, plan

EVERY = (1, 2, 3, 4)
TOLERANCE = 0.03
ROUNDS = 9
QUICK_ROUNDS = 3
HEADERS = (
    "model",
    "every k",
    "HF MiB",
    "memfit MiB",
    "HF layers",
    "memfit regions",
    "HF +%",
    "memfit +%",
    "points",
    "+-",
    "predicted +%",
    "note".rjust(12),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One rival and the plan at its peak. Bytes are above the resident ones."""

    model: str
    attention: str
    every_n_layers: int
    rival_bytes: int
    memfit_bytes: int
    short_bytes: int
    """How much more than the rival's peak the smallest feasible plan needs."""
    rival_layers: int
    memfit_regions: int
    unplanned_seconds: float
    rival_overhead: float
    memfit_overhead: float
    difference: float
    """Median over the rounds of memfit's seconds less the rival's, over the unplanned ones."""
    spread: float
    """Half of the range between the quartiles of that."""
    predicted_overhead: float

    @property
    def passes(self) -> bool:
        return self.difference <= TOLERANCE

    def cells(self) -> list[str]:
        """What the table shows."""
        return [
            self.model,
            str(self.every_n_layers),
            mib(self.rival_bytes),
            mib(self.memfit_bytes),
            str(self.rival_layers),
            str(self.memfit_regions),
            percent(self.rival_overhead),
            percent(self.memfit_overhead),
            percent(self.difference),
            percent(self.spread, sign=False),
            percent(self.predicted_overhead),
            self.note,
        ]

    @property
    def note(self) -> str:
        if not self.passes:
            return "SLOWER"
        return f"{self.short_bytes} B over" if self.short_bytes else ""


def measure_row(workload: Workload, every: int, rounds: int, run: processes.Measure) -> Row:
    """One row; ``run`` carries out each part, in this process or in another."""
    request = {"workload": asdict(workload), "every": every, "rounds": rounds}
    rival = run(request)
    own = run(request | {"rival_bytes": rival["rival_bytes"]})
    return Row(
        model=workload.model,
        attention=workload.attention,
        every_n_layers=every,
        **rival,
        **own,
    )


def measure(request: processes.Request) -> dict[str, Any]:
    """The rival's peak, or where that is told, memfit's peak and the times, in this process."""
    trainer = Trainer.of(Workload(**request["workload"]))
    if "rival_bytes" not in request:
        return _measure_rival(trainer, request["every"])
    made, short_bytes = _plan_at(trainer, request["rival_bytes"])
    with apply(made, trainer.model):
        peak = trainer.peak()
    times = _measure_times(trainer, made, request["every"], request["rounds"])
    return times | {
        "memfit_bytes": peak.peak_bytes,
        "short_bytes": short_bytes,
        "memfit_regions": sum(region.action != "keep" for region in made.regions),
        "predicted_overhead": made.predicted.overhead,
    }


def _measure_rival(trainer: Trainer, every: int) -> dict[str, Any]:
    checkpoint_layers(trainer.model, every)
    layers = count_checkpointed(trainer.model)
    peak = trainer.peak()
    keep_layers(trainer.model)
    return {"rival_bytes": peak.peak_bytes, "rival_layers": layers}


def _plan_at(trainer: Trainer, rival_bytes: int) -> tuple[Plan, int]:
    """The plan at the rival's peak, or the smallest feasible one and how much more it needs."""
    resident = plan(trainer.model, 2**60, trainer.batch).predicted.resident_bytes
    budget = resident + rival_bytes
    try:
        return plan(trainer.model, budget, trainer.batch), 0
    except InfeasibleBudget as error:
        least = error.minimum_bytes
        return plan(trainer.model, least, trainer.batch), least - budget


def _measure_times(trainer: Trainer, made: Plan, every: int, rounds: int) -> dict[str, Any]:
    """The three take turns on one model, which is switched over outside of the clock."""
    switch = _Switch(trainer, made, every)
    contestants = {
        name: Contestant(trainer.step, partial(switch, name))
        for name in ("unplanned", "rival", "memfit")
    }
    if trainer.device == "cpu":
        torch.set_num_threads(1)
    timings = time_steps(contestants, rounds=rounds, device=trainer.device)
    switch("unplanned")
    unplanned, rival, own = (timings[name] for name in contestants)
    gaps = [m - r for m, r in zip(own.ratios(unplanned), rival.ratios(unplanned), strict=True)]
    low, _, high = statistics.quantiles(gaps, n=4)
    return {
        "unplanned_seconds": unplanned.median_seconds,
        "rival_overhead": rival.ratio(unplanned) - 1,
        "memfit_overhead": own.ratio(unplanned) - 1,
        "difference": statistics.median(gaps),
        "spread": (high - low) / 2,
    }


class _Switch:
    """Makes one model train in one of the three ways, and readies it for a step."""

    def __init__(self, trainer: Trainer, made: Plan, every: int) -> None:
        self._trainer = trainer
        self._made = made
        self._every = every
        self._applied: AppliedPlan | None = None

    def __call__(self, name: str) -> None:
        model = self._trainer.model
        keep_layers(model)
        if self._applied is not None:
            self._applied.remove()
            self._applied = None
        if name == "rival":
            checkpoint_layers(model, self._every)
        elif name == "memfit":
            self._applied = apply(self._made, model)
        self._trainer.before()


def measure_all(
    workloads: Sequence[Workload], every: Sequence[int], rounds: int, run: processes.Measure
) -> tuple[list[Row], int]:
    """Measures and prints every row; also how many could not be measured."""
    print("Peaks above what is allocated before the step; +% of the unplanned step's time.\n")
    table = Table(HEADERS)
    rows = []
    points = [(workload, k) for workload in workloads for k in every]
    for workload, k in points:
        try:
            rows.append(measure_row(workload, k, rounds, run))
        except processes.MeasurementFailed as failure:
            print(failure)
            continue
        table.row(rows[-1].cells())
    return rows, len(points) - len(rows)


def conclude(rows: Sequence[Row], lost: int, timed: bool) -> int:
    """Says how many rows fail; the exit code. Steps of tiny models are too short to be timed."""
    slower = sum(not row.passes for row in rows) if timed else 0
    if rows and timed:
        middle = percent(statistics.median(row.difference for row in rows))
        print(f"\nmemfit less HF: {middle} points in the middle of {len(rows)} (below 0: faster).")
    allowed = percent(TOLERANCE, 0, sign=False)
    print(f"\nSlower by more than {allowed} points: {slower}; not measured: {lost}.")
    return 1 if slower or lost else 0


def record(row: Row) -> dict[str, Any]:
    """The row for the results file, with what is derived from it."""
    return asdict(row) | {"passes": row.passes}


def main() -> int:
    arguments = _parse()
    if arguments.alone:
        processes.answer(measure, arguments.alone)
        return 0
    size, rounds = ("tiny", QUICK_ROUNDS) if arguments.quick else ("small", ROUNDS)
    rounds = arguments.rounds or rounds
    workloads = [Workload(model, arguments.attention, size=size) for model in arguments.models]
    begin = time.perf_counter()
    rows, lost = measure_all(workloads, arguments.every, rounds, partial(processes.alone, __file__))
    code = conclude(rows, lost, timed=not arguments.quick)
    if not arguments.quick and len(rows) == len(MODELS) * len(EVERY):
        write_results("frontier-cpu", "cpu", [record(r) for r in rows], time.perf_counter() - begin)
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--attention", choices=ATTENTIONS, default="sdpa")
    parser.add_argument("--every", nargs="+", type=int, default=EVERY, metavar="K")
    parser.add_argument("--rounds", type=int, help="of the three in turns")
    parser.add_argument("--quick", action="store_true", help="tiny models; times mean nothing")
    parser.add_argument(processes.ALONE, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
