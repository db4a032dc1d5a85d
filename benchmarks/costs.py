"""Predicted against measured seconds: of steps, and of the kinds of ops that they are made of.

    python benchmarks/costs.py [--models gpt2 t5] [--quick]

A plan into half of what the unplanned step adds is made with the roofline's seconds and with
measured ones. The unplanned and the planned step take turns; ``points`` is how far the predicted
overhead is from the measured one. ``host %`` is the share of the unplanned step's time that the
host takes to launch it: near 100, the step is bound by that and not by its ops. The second table
says what share of the device's peak the ops reach where they run alone, beside what the device
table assumes. Exit code 1 if an overhead is off by more than 5 points.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import processes
from benchmarks.report import percent, print_rows, write_results
from benchmarks.training import OPTIMIZERS, Trainer, Way, time_ways
from benchmarks.truth import plan_share
from benchmarks.workloads import MODELS, Workload
from memfit.integrations import apply
from memfit.planner.devices import Device
from memfit.planner.preparing import prepare
from memfit.planner.step_graph import Op

COSTS = ("roofline", "measured")
SHARE = 0.5
TOLERANCE = 0.05
ROUNDS, QUICK_ROUNDS = 9, 3
LEAST_LAUNCHES = 4
"""An op tells of the device if its work takes at least so many launches; shorter ones of these."""
HEADERS = (
    "model".rjust(9),
    "costs".rjust(8),
    "unplanned ms",
    "predicted ms",
    "error %",
    "host %",
    "predicted +%",
    "measured +%",
    "points",
)
KIND_HEADERS = ("model".rjust(9), "bound by".rjust(9), "ops", "% of step", "reached %", "assumed %")


@dataclass(frozen=True, slots=True)
class Row:
    """A plan's seconds and the unplanned step's, predicted and measured."""

    model: str
    costs: str
    predicted_seconds: float
    measured_seconds: float
    host_seconds: float | None
    """Until the unplanned step returned, the GPU still at work or not; a CPU does it all itself."""
    predicted_overhead: float
    measured_overhead: float
    recomputed: int
    regions: int

    @property
    def difference(self) -> float:
        return self.predicted_overhead - self.measured_overhead

    @property
    def passes(self) -> bool:
        return abs(self.difference) <= TOLERANCE

    def cells(self) -> list[str]:
        """What the table shows."""
        return [
            self.model,
            self.costs,
            _milli(self.measured_seconds),
            _milli(self.predicted_seconds),
            percent(self.predicted_seconds / self.measured_seconds - 1),
            self._host_share(),
            percent(self.predicted_overhead),
            percent(self.measured_overhead),
            percent(self.difference),
        ]

    def _host_share(self) -> str:
        if self.host_seconds is None:
            return "-"
        return percent(self.host_seconds / self.measured_seconds, 0, sign=False)


@dataclass(frozen=True, slots=True)
class Kind:
    """Ops of a step that are bound by the same thing, run alone on the device."""

    model: str
    bound_by: str
    ops: int
    part: float
    """Their share of the seconds of all ops."""
    reached: float
    """What is least possible by the device's peak figures, over what they took."""
    assumed: float

    def cells(self) -> list[str]:
        """What the table shows."""
        shares = (percent(x, 0, sign=False) for x in (self.part, self.reached, self.assumed))
        return [self.model, self.bound_by, str(self.ops), *shares]


def _milli(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def measure(request: processes.Request) -> dict[str, Any]:
    """The rows of one workload in this process, and its kinds of ops."""
    workload = Workload(**request["workload"])
    trainer = Trainer.shared(workload)
    if trainer.device == "cpu":
        torch.set_num_threads(1)  # before planning, which times ops
    rows = [_measure_row(trainer, workload.model, c, request["rounds"]) for c in COSTS]
    return {
        "rows": [asdict(row) for row in rows],
        "kinds": [asdict(kind) for kind in _kinds(trainer, workload.model)],
    }


def _measure_row(trainer: Trainer, model: str, costs: str, rounds: int) -> Row:
    made, _ = plan_share(trainer, SHARE, costs=costs)
    ways: dict[str, Way] = {
        "unplanned": nullcontext,
        "planned": partial(apply, made, trainer.model),
    }
    timings = time_ways(trainer, ways, rounds)
    return Row(
        model=model,
        costs=costs,
        predicted_seconds=made.predicted.unplanned_step_seconds,
        measured_seconds=timings["unplanned"].median_seconds,
        host_seconds=_host_seconds(trainer, rounds) if trainer.device == "cuda" else None,
        predicted_overhead=made.predicted.overhead,
        measured_overhead=timings["planned"].ratio(timings["unplanned"]) - 1,
        recomputed=sum(region.action != "keep" for region in made.regions),
        regions=len(made.regions),
    )


def _host_seconds(trainer: Trainer, rounds: int) -> float:
    """How long the host takes for a step, which returns before the GPU has done it."""
    taken = []
    for _ in range(rounds):
        trainer.before()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        trainer.step()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _kinds(trainer: Trainer, model: str) -> list[Kind]:
    prepared = prepare(trainer.model, trainer.batch, optimizer=trainer.optimizer, costs="measured")
    return kinds_of(model, prepared.task.step.ops, prepared.task.target.device)


def kinds_of(model: str, ops: Sequence[Op], device: Device) -> list[Kind]:
    """Ops by what binds them, with the share of the device's peak that each kind reaches."""
    found: dict[str, list[tuple[float, float]]] = {}
    for op in ops:
        computing = op.flops / device.peak_flops(op.dtype)
        moving = op.moved_bytes / device.bandwidth_bytes_per_second
        least = max(computing, moving)
        if not least or not op.seconds:
            continue
        bound = "computing" if computing > moving else "moving"
        if least < LEAST_LAUNCHES * device.launch_seconds:
            bound, least = "launch", device.launch_seconds
        found.setdefault(bound, []).append((least, op.seconds))
    assumed = {
        "computing": device.compute_efficiency,
        "moving": device.bandwidth_efficiency,
        "launch": 1.0,
    }
    total = sum(op.seconds for op in ops)
    kinds = []
    for bound, times in sorted(found.items()):
        least, taken = (sum(each) for each in zip(*times, strict=True))
        kinds.append(Kind(model, bound, len(times), taken / total, least / taken, assumed[bound]))
    return kinds


def requests_for(workloads: Iterable[Workload], rounds: int) -> list[processes.Request]:
    """One request for every model."""
    return [{"workload": asdict(workload), "rounds": rounds} for workload in workloads]


def measure_all(
    requests: Sequence[processes.Request], run: processes.Measure
) -> tuple[list[Row], list[Kind], int]:
    """Measures and prints every row; also how many models could not be measured."""
    print(f"Plans into {SHARE:g} of what the unplanned step adds; +% of the unplanned step.\n")
    kinds: list[Kind] = []

    def rows() -> Iterator[Row | processes.MeasurementFailed]:
        for request in requests:
            result = processes.attempt(run, request)
            if isinstance(result, processes.MeasurementFailed):
                yield result
                continue
            kinds.extend(Kind(**kind) for kind in result["kinds"])
            yield from (Row(**row) for row in result["rows"])

    measured, lost = print_rows(HEADERS, rows())
    print("\nOps where they run alone; reached: of the peak, and of what a launch is taken for.\n")
    print_rows(KIND_HEADERS, kinds)
    return measured, kinds, lost


def conclude(rows: Sequence[Row], lost: int, timed: bool) -> int:
    """Says how many rows fail; the exit code. Steps of tiny models are too short to be timed."""
    failed = sum(not row.passes for row in rows) if timed else 0
    off = f"{failed} off by more than {TOLERANCE * 100:g} points"
    print(f"\n{len(rows)} plans, {off}; models not measured: {lost}.")
    return 1 if failed or lost else 0


def record(row: Row | Kind) -> dict[str, Any]:
    """The row for the results file."""
    return asdict(row) | ({"passes": row.passes} if isinstance(row, Row) else {})


def main() -> int:
    arguments = _parse()
    if arguments.alone:
        processes.answer(measure, arguments.alone)
        return 0
    size, rounds = ("tiny", QUICK_ROUNDS) if arguments.quick else ("small", ROUNDS)
    workloads = [
        Workload(model, size=size, optimizer=arguments.optimizer) for model in arguments.models
    ]
    begin = time.perf_counter()
    run = partial(processes.alone, __file__)
    rows, kinds, lost = measure_all(requests_for(workloads, rounds), run)
    if not arguments.quick and {row.model for row in rows} == set(MODELS):
        records = [*map(record, rows), *map(record, kinds)]
        write_results("costs-cpu", "cpu", records, time.perf_counter() - begin)
    return conclude(rows, lost, timed=not arguments.quick)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="its step is part of the step")
    parser.add_argument("--quick", action="store_true", help="tiny models; times mean nothing")
    parser.add_argument(processes.ALONE, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
