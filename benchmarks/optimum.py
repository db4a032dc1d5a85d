"""How far plans are from the best schedule of any kind, on decoder layers of eight ops each.

    python benchmarks/optimum.py [--layers 2 3 4] [--budgets 0.5 0.9]

The planner plans the step as it plans a captured one; the general program (Checkmate's) may compute
any op at any time, as often as it likes. Where it is not solved within the limit, its bound stands
in the table, which makes the gap too large, never too small. Exit code 1 if a plan is more than 1.5
points of the step's seconds from it, at budgets from 0.4 (two layers: 0.6) to 0.9 of the peak of
the step in which nothing is recomputed.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.coarse import general_graph, step_graph
from benchmarks.report import Table, percent, write_results
from memfit.planner.solving import Task
from memfit.planner.target import find_target
from memfit.solvers import AUTO, Limits, checkmate
from memfit.solvers.general import peak_bytes

LAYERS = (2, 3, 4)
SHARES = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
LOWEST_OF_TWO = 0.6
ALLOWED = 0.015
HEADERS = ("layers", "share", "overhead %", "optimum %", "gap", "proved", "seconds")


@dataclass(frozen=True, slots=True)
class Row:
    """One budget."""

    layers: int
    share: float
    overhead: float
    optimum: float
    """Or its bound."""
    status: str
    seconds: float
    """That the general program took."""

    @property
    def gap(self) -> float:
        return self.overhead - self.optimum

    def cells(self) -> list[str]:
        """What the table shows."""
        shares = (percent(x, 2, sign=False) for x in (self.overhead, self.optimum, self.gap))
        return [str(self.layers), f"{self.share:g}", *shares, self.status, f"{self.seconds:.1f}"]


def measure(layers: int, shares: Sequence[float], seconds: float) -> Iterator[Row]:
    """Plan and optimum at each budget."""
    graph, step = general_graph(layers), step_graph(layers)
    peak = peak_bytes(graph, tuple(range(len(graph.nodes))))
    target = find_target(nn.Linear(1, 1, device="meta"), "a100-80gb")
    for share in shares:
        if layers == 2 and share < LOWEST_OF_TWO:
            continue
        budget = round(share * peak)
        outcome = Task.of(step, target, Limits()).within(budget).solve(AUTO)
        begin = time.perf_counter()
        best = checkmate.solve(graph, budget, Limits(gap=1e-3, seconds=seconds))
        took = time.perf_counter() - begin
        overhead = outcome.solution.recompute_seconds / step.seconds
        optimum = max(0.0, best.bound_seconds / step.seconds - 1)
        yield Row(layers, share, overhead, optimum, best.status.value, took)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, choices=LAYERS, default=LAYERS)
    parser.add_argument("--budgets", nargs="+", type=float, metavar="SHARE", default=SHARES)
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    table, rows = Table(HEADERS), []
    for layers in arguments.layers:
        for row in measure(layers, arguments.budgets, arguments.time_limit):
            table.row(row.cells())
            rows.append(row)
    worst = max(rows, key=lambda row: row.gap)
    print(f"\nLargest gap: {percent(worst.gap, 2)} points, allowed {percent(ALLOWED, 1)}.")
    if tuple(arguments.layers) == LAYERS and tuple(arguments.budgets) == SHARES:
        took = time.perf_counter() - begin
        write_results("optimum-cpu", "cpu", [asdict(row) for row in rows], took)
    return 1 if worst.gap > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
