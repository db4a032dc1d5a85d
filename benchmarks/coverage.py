"""Every trainable class of transformers: is it planned into half of its memory, and does it hold?

    python benchmarks/coverage.py [--every] [--types llama t5] [--jobs 2]

Each class is built small, planned at half of what its unplanned step adds (or at the least that can
be done), and trained for a step with the plan and without: gradients have to be equal to the bit
and the allocator's peak within the budget. One class for each model type, or with ``--every`` all
of them. Exit code 1 if fewer than 97 % pass, or any plan changes a gradient or breaks its budget.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from benchmarks import processes
from benchmarks.report import Table, percent, write_results
from benchmarks.training import Trainer
from benchmarks.truth import compare, plan_share
from benchmarks.zoo import ModelClass, NotBuildable, build, trainable_classes
from memfit.integrations import apply
from memfit.integrations.forwards import MemfitWarning
from memfit.planner.caching import caching_modules, without_cache
from memfit.planner.errors import MemfitError

SHARE = 0.5
ASKED = 0.97
NEARLY = 0.01
_SECONDS = 180.0
HEADERS = ("model type", f"{'class':<40}", "result", "error %", "share", "regions")


@dataclass(frozen=True, slots=True)
class Row:
    """One class. Bytes are above the resident ones, and 0 where there is no plan."""

    model_type: str
    class_name: str
    result: str
    """``passed``, ``not built``, ``own error`` of a step without a plan, or what failed."""
    reason: str = ""
    unplanned_bytes: int = 0
    budget_bytes: int = 0
    predicted_bytes: int = 0
    measured_bytes: int = 0
    recomputed: int = 0
    regions: int = 0
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1 if self.measured_bytes else 0.0

    def cells(self) -> list[str]:
        """What the table shows."""
        share = self.budget_bytes / self.unplanned_bytes if self.unplanned_bytes else 0.0
        return [
            self.model_type,
            self.class_name,
            self.result,
            percent(self.error, 3),
            f"{share:.2f}",
            f"{self.recomputed}/{self.regions}",
        ]


def measure(request: processes.Request) -> dict[str, Any]:
    """Plans and trains one class in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", MemfitWarning)
    model_class = ModelClass(request["model_type"], request["class_name"])
    try:
        model, batch = build(model_class)
    except NotBuildable as error:
        return asdict(_row(model_class, "not built", str(error)))
    for module in caching_modules(model):  # a plan switches caches off
        module.register_forward_pre_hook(without_cache, with_kwargs=True)
    trainer = Trainer(model, batch)
    try:
        trainer.outcome()
    except Exception as error:
        return asdict(_row(model_class, "own error", f"{type(error).__name__}: {error}"[:300]))
    try:
        made, _ = plan_share(trainer, SHARE)
    except MemfitError as error:
        return asdict(_row(model_class, "no plan", str(error)))
    equal = compare(trainer, made)
    with apply(made, model):
        measured_bytes = trainer.peak().peak_bytes
    predicted = made.predicted
    allocated = made.budget_bytes - predicted.resident_bytes
    result = "passed"
    if equal == "no":
        result = "gradients"
    elif measured_bytes > allocated:
        result = "budget"
    return asdict(
        Row(
            model_type=model_class.model_type,
            class_name=model_class.class_name,
            result=result,
            unplanned_bytes=predicted.unplanned_peak_bytes - predicted.resident_bytes,
            budget_bytes=allocated,
            predicted_bytes=predicted.peak_bytes - predicted.resident_bytes,
            measured_bytes=measured_bytes,
            recomputed=sum(region.action != "keep" for region in made.regions),
            regions=len(made.regions),
            notes=made.workload.notes,
        )
    )


def _row(model_class: ModelClass, result: str, reason: str) -> Row:
    return Row(model_class.model_type, model_class.class_name, result, reason)


def measure_all(classes: Sequence[ModelClass], jobs: int) -> list[Row]:
    """Measures every class in a process of its own and prints what does not pass."""
    table = Table(HEADERS)
    rows = []
    requests = [asdict(c) for c in classes]
    for request, result in processes.forks(measure, requests, jobs, _SECONDS):
        if isinstance(result, processes.MeasurementFailed):
            lines = str(result).strip().splitlines()
            row = _row(ModelClass(**request), "fails", lines[-1] if lines else "")
        else:
            row = Row(**result)
        rows.append(row)
        table.row(row.cells())
        if row.reason:
            print(f"    {row.reason}")
    return sorted(rows, key=lambda row: (row.model_type, row.class_name))


def conclude(rows: Sequence[Row]) -> int:
    """Says how many pass and how near predictions are; the exit code."""
    built = [row for row in rows if row.result not in ("not built", "own error")]
    counts = Counter(row.result for row in rows)
    print("\n" + ", ".join(f"{count} {result}" for result, count in counts.most_common()))
    if not built:
        return 1
    passed = counts["passed"] / len(built)
    errors = sorted(abs(row.error) for row in built if row.measured_bytes)
    near = sum(error <= NEARLY for error in errors) / max(1, len(errors))
    print(
        f"{percent(passed, 2, sign=False)} % of the classes that can be built pass; predicted "
        f"peaks: median error {percent(statistics.median(errors or [0.0]), 4, sign=False)} %, "
        f"{percent(near, 1, sign=False)} % within {percent(NEARLY, 0, sign=False)} %"
    )
    return 0 if passed >= ASKED and not counts["gradients"] and not counts["budget"] else 1


def main() -> int:
    arguments = _parse()
    begin = time.perf_counter()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    classes = [
        c
        for c in trainable_classes(every=arguments.every)
        if not arguments.types or c.model_type in arguments.types
    ]
    rows = measure_all(classes, arguments.jobs)
    code = conclude(rows)
    if not arguments.types:
        name = "coverage-every-cpu" if arguments.every else "coverage-cpu"
        write_results(name, "cpu", [asdict(row) for row in rows], time.perf_counter() - begin)
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", action="store_true", help="all classes, not one a model type")
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types to measure")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="classes at a time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
