"""Predicted against measured on a CUDA device: what truth.py asks, and what only a GPU can tell.

A plan is made ``here``, for the model on the device, or ``apart``, for the model on ``meta`` by the
roofline, as on a machine without a GPU. Its peak is compared with ``max_memory_allocated``, all
that the process has; ``reserved`` is what the caching allocator took for it. ``ballast`` says how
much more than the budget had to be left free, by a tensor that fills the rest of the GPU, for the
step to run. Gradients must be equal to the bit, or, where the unplanned step does not repeat itself
(``noisy``), no further from it than twice as far as it is from itself. Depends on truth.py.
"""

import gc
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from benchmarks import processes
from benchmarks.measure import Outcome, bitwise_equal
from benchmarks.report import mib, percent, print_rows
from benchmarks.training import Trainer
from benchmarks.truth import plan_share
from benchmarks.workloads import Workload
from memfit.integrations import apply
from memfit.integrations.forwards import MemfitWarning
from memfit.planner import Plan
from memfit.planner.target import find_target

HERE, APART = "here", "apart"
SHARES = (1.0, 0.7, 0.5, 0.35)
TOLERANCES = {HERE: 0.005, APART: 0.01}
NOISE_FACTOR = 2.0
REPEATS = 2
"""How often the unplanned step is repeated to see how far it is from itself."""
EXCESSES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the budget that are left free beside it, one after the other until the step runs."""
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
_SEGMENT_BYTES = 2 * 2**20
"""What CUDA's allocator takes from the GPU is a multiple of this."""
HEADERS = (
    "model".rjust(9),
    "share",
    "made",
    "budget MiB",
    "predicted",
    "measured",
    "error %",
    "fits",
    "reserved",
    "ballast",
    "equal",
    "overhead %",
    "regions",
    "plan s",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One plan, predicted and measured. Bytes are all that is allocated."""

    model: str
    share: float
    made: str
    at_minimum: bool
    """The share asked for cannot be done; the budget is the smallest that can."""
    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    before_bytes: int
    """What of the measured bytes was there before the step."""
    reserved_bytes: int | None
    """At most, by the caching allocator; a CPU has none."""
    excess: float | None
    """What had to be free beside the budget, as a share of it; None where nothing was filled."""
    equal: str
    difference: float
    """Length of the difference of all gradients from the unplanned ones, over that of those."""
    noise: float
    """The same of the unplanned step from itself, at most; 0 where that was not asked."""
    predicted_overhead: float
    recomputed: int
    regions: int
    plan_seconds: float

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def within_budget(self) -> bool:
        return self.measured_bytes <= self.budget_bytes

    @property
    def passes(self) -> bool:
        is_true = abs(self.error) <= TOLERANCES[self.made] and self.within_budget
        return is_true and not self.excess and self.equal != "no"

    def cells(self) -> list[str]:
        """What the table shows."""
        return [
            self.model,
            "least" if self.at_minimum else f"{self.share:g}",
            self.made,
            mib(self.budget_bytes),
            mib(self.predicted_bytes),
            mib(self.measured_bytes),
            percent(self.error, 4),
            "yes" if self.within_budget else "NO",
            "-" if self.reserved_bytes is None else mib(self.reserved_bytes),
            "-" if self.excess is None else f"{percent(self.excess)} %" if self.excess else "runs",
            self.equal if self.equal != "no" else "NO",
            percent(self.predicted_overhead),
            f"{self.recomputed}/{self.regions}",
            f"{self.plan_seconds:.1f}",
        ]


def requests_for(
    workloads: Iterable[Workload], shares: Iterable[float], made: Iterable[str]
) -> list[processes.Request]:
    """One request for every row."""
    pairs = list(product(shares, made))
    return [{"workload": asdict(w), "share": s, "made": m} for w in workloads for s, m in pairs]


def measure(request: processes.Request) -> dict[str, Any]:
    """Plans, trains and measures one row. A plan that is not kept to in full fails."""
    warnings.simplefilter("error", MemfitWarning)
    workload = Workload(**request["workload"])
    trainer = Trainer.shared(workload)
    begin = time.perf_counter()
    made, at_minimum = _plan(trainer, workload, request["share"], request["made"])
    plan_seconds = time.perf_counter() - begin
    on_gpu = workload.device == "cuda"
    _begin_empty(trainer)  # what other rows left is not to count as reserved
    with apply(made, trainer.model):
        peak = trainer.peak()
        reserved_bytes = torch.cuda.max_memory_reserved() if on_gpu else None
        is_filled = on_gpu and request["made"] == HERE
        excess = find_excess(trainer, made.budget_bytes) if is_filled else None
    before_bytes = peak.before_bytes or trainer.held_bytes()
    equal, difference, noise = _compare(trainer, made)
    return asdict(
        Row(
            model=workload.model,
            share=request["share"],
            made=request["made"],
            at_minimum=at_minimum,
            budget_bytes=made.budget_bytes,
            predicted_bytes=made.predicted.peak_bytes,
            measured_bytes=before_bytes + peak.peak_bytes,
            before_bytes=before_bytes,
            reserved_bytes=reserved_bytes,
            excess=excess,
            equal=equal,
            difference=difference,
            noise=noise,
            predicted_overhead=made.predicted.overhead,
            recomputed=sum(region.action != "keep" for region in made.regions),
            regions=len(made.regions),
            plan_seconds=plan_seconds,
        )
    )


def _plan(trainer: Trainer, workload: Workload, share: float, made: str) -> tuple[Plan, bool]:
    """The plan, made on the device or apart from it, and whether it is the least that can be."""
    if made == HERE:
        return plan_share(trainer, share)
    name = find_target(trainer.model, None).device.name
    absent = Trainer.of(replace(workload, device="meta"))
    return plan_share(absent, share, trainer.unplanned, device=name, costs="roofline")


def find_excess(trainer: Trainer, budget_bytes: int) -> float:
    """What has to be free beside the budget for a step to run; 1 if none of the shares will do."""
    for excess in EXCESSES:
        if _runs_within(trainer, int(budget_bytes * (1 + excess))):
            return excess
    return 1.0


def _begin_empty(trainer: Trainer) -> None:
    """Ready for a step, with nothing in CUDA's cache."""
    trainer.before()
    gc.collect()
    torch.cuda.empty_cache()


def _runs_within(trainer: Trainer, limit_bytes: int) -> bool:
    """Whether a step runs with all of the GPU filled but for the limit, what is there included."""
    torch.cuda.synchronize()
    _begin_empty(trainer)
    free_bytes, _ = torch.cuda.mem_get_info()
    segments = (free_bytes + torch.cuda.memory_reserved() - limit_bytes) // _SEGMENT_BYTES
    ballast = None
    try:
        ballast = torch.empty(max(0, segments) * _SEGMENT_BYTES, dtype=torch.uint8, device="cuda")
        trainer.step()
        torch.cuda.synchronize()
    except RuntimeError as error:  # PyTorch's own, or that of a library that allocates by itself
        if not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        return False
    finally:
        del ballast
        torch.cuda.empty_cache()
    return True


def _compare(trainer: Trainer, made: Plan) -> tuple[str, float, float]:
    """Whether the planned step computes what the unplanned one does, and how far they are apart."""
    unplanned = trainer.outcome()
    with apply(made, trainer.model):
        planned = trainer.outcome()
    if bitwise_equal(unplanned, planned):
        return "yes", 0.0, 0.0
    difference = distance(planned, unplanned)
    del planned
    noise = max(distance(trainer.outcome(), unplanned) for _ in range(REPEATS))
    return ("noisy" if difference <= NOISE_FACTOR * noise else "no"), difference, noise


def distance(one: Outcome, other: Outcome) -> float:
    """Length of the difference of all gradients over the length of the other's; a gradient that
    only one of them has counts as if all were missing, as 1."""
    if one.gradients.keys() != other.gradients.keys():
        return 1.0
    pairs = [(one.gradients[name], gradient) for name, gradient in other.gradients.items()]
    apart = sum(float((a - b).double().norm()) ** 2 for a, b in pairs)
    length = sum(float(b.double().norm()) ** 2 for _, b in pairs)
    return float((apart / length) ** 0.5)


def measure_all(
    requests: Sequence[processes.Request], run: processes.Measure
) -> tuple[list[Row], int]:
    """Measures and prints every row; also how many could not be measured.

    Shares come from the largest to the smallest: after the least plan there is no other.
    """
    print("All that is allocated at the peak; regions: recomputed of all.\n")
    least: set[tuple[str, str]] = set()

    def measured() -> Iterator[Row | processes.MeasurementFailed]:
        for request in requests:
            which = request["workload"]["model"], request["made"]
            if which in least:
                continue
            result = processes.attempt(run, request)
            if isinstance(result, processes.MeasurementFailed):
                yield result
                continue
            row = Row(**result)
            if row.at_minimum:
                least.add(which)
            yield row

    return print_rows(HEADERS, measured())


def conclude(rows: Sequence[Row], lost: int) -> int:
    """Says how many rows fail; the exit code."""
    failed = sum(not row.passes for row in rows)
    print(f"\n{len(rows)} plans, {failed} failed, {lost} not measured.")
    for made, allowed in TOLERANCES.items():
        errors = [abs(row.error) for row in rows if row.made == made]
        worst = percent(max(errors, default=0.0), 4, sign=False)
        print(f"Largest error, made {made}: {worst} % (allowed {percent(allowed, sign=False)} %).")
    return 1 if failed or lost else 0


def record(row: Row) -> dict[str, Any]:
    """The row for the results file, with what is derived from it."""
    return asdict(row) | {"error": row.error, "passes": row.passes}
