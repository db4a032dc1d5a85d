"""Predicted against measured: does a plan keep its budget, peak where it says, and change nothing?

    python benchmarks/truth.py [--models gpt2 t5] [--budgets 0.6] [--dropout 0 0.1] [--quick]

A budget is a share of what the unplanned step adds to what is allocated before it; where that is
less than can be done, the smallest feasible budget stands in. Every row is measured in a process of
its own. Exit code 1 if any row is off by more than 0.5 %, over its budget, or not bitwise equal.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import processes
from benchmarks.measure import bitwise_equal
from benchmarks.report import mib, percent, print_rows, write_results
from benchmarks.training import OPTIMIZERS, Trainer
from benchmarks.workloads import ATTENTIONS, DROPOUT, MODELS, Workload
from memfit.integrations import apply
from memfit.integrations.forwards import MemfitWarning
from memfit.planner import InfeasibleBudget, Plan
from memfit.planner.document import Predicted

BUDGETS = (1.0, 0.8, 0.6, 0.45, 0.3)
QUICK_BUDGETS = (1.0, 0.6)
TOLERANCE = 0.005
HEADERS = (
    "model",
    "attention",
    "dropout",
    "share",
    "budget MiB",
    "predicted",
    "measured",
    "error %",
    "fits",
    "equal",
    "overhead %",
    "regions",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One plan, predicted and measured. Bytes are above the resident ones, but for the budget."""

    model: str
    attention: str
    dropout: float
    optimizer: str | None
    autocast: str | None
    accumulate: bool
    share: float
    at_minimum: bool
    """The share asked for cannot be done; the budget is the smallest that can."""
    budget_bytes: int
    resident_bytes: int
    predicted_bytes: int
    measured_bytes: int
    allocated_bytes: int
    """All at the peak: on CUDA with the libraries' workspaces, on a CPU what the step adds to the
    tensors that are there before it."""
    equal: str
    """``yes``, ``no``, or ``noisy``: the unplanned step does not repeat itself either."""
    predicted_overhead: float
    recomputed: int
    regions: int
    plan_seconds: float

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def within_budget(self) -> bool:
        return self.allocated_bytes <= self.budget_bytes

    @property
    def passes(self) -> bool:
        return abs(self.error) <= TOLERANCE and self.within_budget and self.equal != "no"

    def cells(self) -> list[str]:
        """What the table shows."""
        return [
            self.model,
            self.attention,
            f"{self.dropout:g}",
            "least" if self.at_minimum else f"{self.share:g}",
            mib(self.budget_bytes - self.resident_bytes),
            mib(self.predicted_bytes),
            mib(self.measured_bytes),
            percent(self.error, 3),
            "yes" if self.within_budget else "NO",
            self.equal if self.equal != "no" else "NO",
            percent(self.predicted_overhead),
            f"{self.recomputed}/{self.regions}",
        ]


def measure(request: processes.Request) -> dict[str, Any]:
    """Plans, trains and measures one row in this process.

    A plan that is not kept to in full fails.
    """
    warnings.simplefilter("error", MemfitWarning)
    workload = Workload(**request["workload"])
    trainer = Trainer.of(workload)
    begin = time.perf_counter()
    made, at_minimum = plan_share(trainer, request["share"])
    plan_seconds = time.perf_counter() - begin
    equal = compare(trainer, made)
    with apply(made, trainer.model):
        peak = trainer.peak()
    predicted = made.predicted
    return asdict(
        Row(
            model=workload.model,
            attention=workload.attention,
            dropout=workload.dropout,
            optimizer=workload.optimizer,
            autocast=workload.autocast,
            accumulate=workload.accumulate,
            share=request["share"],
            at_minimum=at_minimum,
            budget_bytes=made.budget_bytes,
            resident_bytes=predicted.resident_bytes,
            predicted_bytes=predicted.peak_bytes - predicted.resident_bytes,
            measured_bytes=peak.peak_bytes,
            allocated_bytes=(peak.before_bytes or trainer.held_bytes()) + peak.peak_bytes,
            equal=equal,
            predicted_overhead=predicted.overhead,
            recomputed=sum(region.action != "keep" for region in made.regions),
            regions=len(made.regions),
            plan_seconds=plan_seconds,
        )
    )


def plan_share(
    trainer: Trainer, share: float, unplanned: Predicted | None = None, **options: Any
) -> tuple[Plan, bool]:
    """The plan for a share of the unplanned step's bytes, or for the least that can be done.

    Those bytes are the trainer's own unless they are given; ``options`` are more of ``plan``'s.
    """
    unplanned = unplanned or trainer.unplanned
    dynamic = unplanned.unplanned_peak_bytes - unplanned.resident_bytes
    try:
        return trainer.plan(unplanned.resident_bytes + int(dynamic * share), **options), False
    except InfeasibleBudget as error:
        return trainer.plan(error.minimum_bytes, **options), True


def compare(trainer: Trainer, made: Plan) -> str:
    """Whether the planned step computes what the unplanned one does, to the bit."""
    unplanned = trainer.outcome()
    with apply(made, trainer.model):
        planned = trainer.outcome()
    if bitwise_equal(unplanned, planned):
        return "yes"
    return "no" if bitwise_equal(unplanned, trainer.outcome()) else "noisy"


def measure_all(
    requests: Sequence[processes.Request], measure_one: processes.Measure, jobs: int
) -> tuple[list[Row], int]:
    """Measures and prints every row; also how many could not be measured."""
    print("MiB above what is allocated before the step; regions: recomputed of all.\n")
    results = processes.each(measure_one, requests, jobs)
    return print_rows(HEADERS, (r if isinstance(r, Exception) else Row(**r) for r in results))


def conclude(rows: Sequence[Row], lost: int) -> int:
    """Says how many rows fail; the exit code."""
    failed = sum(not row.passes for row in rows) + lost
    worst = percent(max((abs(row.error) for row in rows), default=0.0), 4, sign=False)
    allowed = percent(TOLERANCE, sign=False)
    print(f"\n{len(rows)} plans, {failed} failed; largest error {worst} %, allowed {allowed} %.")
    return 1 if failed else 0


def record(row: Row) -> dict[str, Any]:
    """The row for the results file, with what is derived from it."""
    return asdict(row) | {
        "error": row.error,
        "within_budget": row.within_budget,
        "passes": row.passes,
    }


def requests_for(workloads: Iterable[Workload], shares: Iterable[float]) -> list[processes.Request]:
    """One request for every row."""
    shares = list(shares)
    return [{"workload": asdict(w), "share": share} for w in workloads for share in shares]


def main() -> int:
    arguments = _parse()
    if arguments.alone:
        processes.answer(measure, arguments.alone)
        return 0
    size, shares = ("tiny", QUICK_BUDGETS) if arguments.quick else ("small", BUDGETS)
    shares = arguments.budgets or shares
    workloads = [
        Workload(
            model,
            attention,
            dropout,
            size=size,
            optimizer=arguments.optimizer,
            autocast=arguments.autocast,
            accumulate=arguments.accumulate,
        )
        for model in arguments.models
        for attention in arguments.attention
        for dropout in arguments.dropout
    ]
    begin = time.perf_counter()
    requests = requests_for(workloads, shares)
    rows, lost = measure_all(requests, partial(processes.alone, __file__), arguments.jobs)
    code = conclude(rows, lost)
    full_table = len(MODELS) * len(ATTENTIONS) * len(BUDGETS) * len(arguments.dropout)
    if not arguments.quick and DROPOUT in arguments.dropout and len(rows) == full_table:
        what = arguments.optimizer, arguments.autocast, "accumulate" * arguments.accumulate
        name = "-".join(filter(None, ["truth-cpu", *what]))
        write_results(name, "cpu", [record(r) for r in rows], time.perf_counter() - begin)
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS)
    parser.add_argument("--dropout", nargs="+", type=float, default=[DROPOUT], metavar="P")
    parser.add_argument("--budgets", nargs="+", type=float, metavar="SHARE")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="its step is part of the step")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="of the forward")
    parser.add_argument("--accumulate", action="store_true", help="add to a step's gradients")
    parser.add_argument("--quick", action="store_true", help="tiny models, two budgets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time")
    parser.add_argument(processes.ALONE, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
