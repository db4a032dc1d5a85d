"""Every solver on the same problems: how long it takes, and how much recomputation it chooses.

    python benchmarks/solvers.py [--quick]

Budgets lie between the peaks of nothing recomputed and everything recomputed. Two planners of torch
are given the same layers, seconds and bytes, and both solve a looser problem. ``sac_ilp`` of
``torch.distributed._tools`` may discard any fraction of a layer along straight lines through the
options and has no rows for forwards, at a gap of 5 % and by CBC. The knapsack behind
``torch._functorch.config.activation_memory_budget`` has one row, for what is stored at the end of
the forward, and none for what recomputation takes.

Below the peak of everything recomputed, at 0.75 of it, 32 layers may be chained.

Exit code 1 if two solvers that prove their answers differ, or if a limit is missed: 0.3 s for 80
identical layers, 2 s for 80 distinct ones at a gap of 0.05 % of the step, 200 layers in 1.5 times
what 20 take, a choice for the chained ones.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.instances import (
    INPUT_MIB,
    LOSS_MIB,
    MIB,
    Instance,
    nested,
    random_graph,
    resnet,
    transformer,
    unet,
)
from benchmarks.report import Table, percent, write_results
from memfit.solvers import SOLVERS, Limits, Problem, Status

NAMES = ("count_ilp", "flat_ilp", "nested_dp", "greedy", "every_2", "full")
CHAINED = ("nested_dp", "sqrt_n", "full")
SAC, KNAPSACK = "sac_milp", "knapsack"
MOST_FOR_TORCH = 32
"""Layers that the planners of torch are given."""
BELOW = 0.75
"""Of the peak of everything recomputed."""
SHARES = (0.2, 0.5, 0.8)
GAP = 5e-4
"""Of the step's seconds."""
REPEATS = 3
HEADERS = (
    "instance".rjust(20),
    "share",
    "solver".rjust(9),
    "status".rjust(10),
    "seconds",
    "overhead %",
    "variables",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One solver on one problem."""

    instance: str
    share: float
    solver: str
    status: str
    solve_seconds: float
    overhead: float | None
    variables: int

    def cells(self) -> list[str]:
        """What the table shows."""
        overhead = "-" if self.overhead is None else percent(self.overhead, 2, sign=False)
        return [
            self.instance,
            f"{self.share:g}",
            self.solver,
            self.status,
            f"{self.solve_seconds:.3f}",
            overhead,
            str(self.variables or "-"),
        ]


def instances(quick: bool) -> list[Instance]:
    """From small to large, chains and others."""
    if quick:
        return [transformer(4, options=4), unet(1, options=3)]
    alike = [transformer(n) for n in (4, 20, 32, 80, 200)]
    others = [resnet(), unet(3), unet(6), random_graph(24)]
    return [*alike, transformer(80, distinct=True), *others]


def measure(instance: Instance, share: float) -> list[Row]:
    """All solvers at one budget."""
    most, least = instance.peaks()
    problem = replace(instance.problem, budget_bytes=round(least + share * (most - least)))
    rows = _measure(instance, problem, share, NAMES)
    if not problem.shared and len(problem.regions) <= MOST_FOR_TORCH:
        rows.append(_measure_sac(instance, problem, share))
        rows.append(_measure_knapsack(instance, share))
    return rows


def measure_chained(instance: Instance) -> list[Row]:
    """Solvers that choose segments, and full recomputation, below what that needs."""
    _, least = instance.peaks()
    problem = replace(instance.problem, budget_bytes=round(BELOW * least))
    return _measure(instance, problem, BELOW, CHAINED)


def _measure(instance: Instance, problem: Problem, share: float, names: Sequence[str]) -> list[Row]:
    limits = Limits(0.0, 20.0, GAP * instance.step_seconds)
    rows = []
    for name in names:
        solutions = [SOLVERS[name](problem, limits) for _ in range(REPEATS)]
        solution = solutions[0]
        fits = solution.status in (Status.OPTIMAL, Status.FEASIBLE)
        rows.append(
            Row(
                instance.name,
                share,
                name,
                solution.status.value,
                statistics.median(s.solve_seconds for s in solutions),
                solution.recompute_seconds / instance.step_seconds if fits else None,
                solution.variables,
            )
        )
    return rows


def _measure_knapsack(instance: Instance, share: float) -> Row:
    """Every result of every layer is an item; ``share`` of the bytes of all may be stored."""
    from torch._functorch._activation_checkpointing.knapsack import dp_knapsack

    total = sum(size for _, _, size in instance.ops)
    sizes = [size / total for _, _, size in instance.ops]
    seconds = [seconds for _, seconds, _ in instance.ops]
    started = time.perf_counter()
    _, _, dropped = dp_knapsack(sizes, seconds, share)
    took = time.perf_counter() - started
    overhead = sum(seconds[i] for i in dropped) / instance.step_seconds
    return Row(instance.name, share, KNAPSACK, "feasible", took, overhead, len(sizes))


def _measure_sac(instance: Instance, problem: Problem, share: float) -> Row:
    from torch.distributed._tools.sac_ilp import sac_milp

    graph = _sac_graph(problem)
    started = time.perf_counter()
    _, milliseconds, peak = sac_milp(graph, problem.budget_bytes / 2**30)
    took = time.perf_counter() - started
    overhead = milliseconds / 1e3 / instance.step_seconds if peak >= 0 else None
    status = "feasible" if peak >= 0 else "infeasible"
    return Row(instance.name, share, SAC, status, took, overhead, 7 * (len(problem.regions) + 2))


def _sac_graph(problem: Problem) -> Any:
    """The problem as ``sac_milp`` takes it: modules with trade-off curves of straight lines."""
    from torch.distributed._tools.ilp_utils import Graph

    count = len(problem.regions)
    graph = Graph(count + 2)
    graph.fw_post_order = [*(region.name for region in problem.regions), "head", "model"]
    base = min(moment.base_bytes for moment in problem.moments)
    backwards = {m.region: m.base_bytes - base for m in problem.moments if m.phase == "backward"}
    stored = 0
    root: dict[str, Any] = {
        "param_per_module": base, "grad_total": 0, "act_total": 0, "act_grad_per_module": 0,
        "act_fw_per_module": 0, "is_leaf": True, "sac_runtime": 0, "sac_memory": 0,
        "n_segments": 0, "slopes": [], "intercepts": [],
    }  # fmt: skip
    nodes = [root | {"fqn": "model", "index": 0, "pos_fw_post_order": count + 1}]
    for r, region in enumerate(problem.regions):
        keep, most = region.options[0], region.options[-1]
        own = keep.stored_bytes - INPUT_MIB * MIB
        lines = _lines(region.options)
        stored += keep.stored_bytes
        nodes.append(
            {
                **root,
                "fqn": region.name,
                "index": r + 1,
                "pos_fw_post_order": r,
                "grad_total": backwards[r],
                "act_total": stored,
                "act_grad_per_module": keep.backward_bytes - keep.stored_bytes,
                "act_fw_per_module": own,
                "is_leaf": False,
                "sac_runtime": most.recompute_seconds * 1e3,
                "sac_memory": own,
                "n_segments": len(lines),
                "slopes": [slope for slope, _ in lines],
                "intercepts": [intercept for _, intercept in lines],
            }
        )
    nodes[0]["act_total"] = stored
    head = {"fqn": "head", "index": count + 1, "pos_fw_post_order": count, "act_total": stored}
    nodes.append(root | head | {"act_grad_per_module": LOSS_MIB * MIB})
    for node in nodes:
        graph.add_node(node)  # type: ignore[arg-type]
    graph.ad_matrix[0, :] = 1
    return graph


def _lines(options: Sequence[Any]) -> list[tuple[float, float]]:
    """Lower convex hull of the share of seconds over the share of bytes discarded."""
    keep, most = options[0], options[-1]
    freed = keep.stored_bytes - most.stored_bytes
    points = sorted(
        ((keep.stored_bytes - o.stored_bytes) / freed, o.recompute_seconds / most.recompute_seconds)
        for o in options
    )
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x1) < (y - y1) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    lines = []
    for (x1, y1), (x2, y2) in pairwise(hull):
        slope = (y2 - y1) / (x2 - x1)
        lines.append((slope, y1 - slope * x1))
    return lines


def missed(rows: Sequence[Row]) -> list[str]:
    """Which limits do not hold, in words."""
    found = []
    for row in rows:
        if (row.instance, row.solver) == ("80 identical layers", "count_ilp"):
            found += [_late(row, 0.3)] if row.solve_seconds > 0.3 else []
        if (row.instance, row.solver) == ("80 distinct layers", "flat_ilp"):
            found += [_late(row, 2.0)] if row.solve_seconds > 2.0 else []
    taken = {
        layers: sum(
            row.solve_seconds
            for row in rows
            if (row.instance, row.solver) == (f"{layers} identical layers", "count_ilp")
        )
        for layers in (20, 200)
    }
    if taken[200] > 1.5 * taken[20]:
        found.append(f"200 layers take {taken[200] / taken[20]:.2f} times as long as 20")
    if not any(row.solver == "nested_dp" and row.share == BELOW and row.overhead for row in rows):
        found.append(f"nothing at {BELOW:g} of the peak of everything recomputed")
    proved = {name: [r for r in rows if r.solver == name] for name in ("count_ilp", "flat_ilp")}
    for count, flat in zip(proved["count_ilp"], proved["flat_ilp"], strict=True):
        both = count.status == flat.status == "optimal"
        if both and abs((count.overhead or 0.0) - (flat.overhead or 0.0)) > GAP:
            found.append(f"{count.instance} at {count.share}: two optima")
    return found


def _late(row: Row, seconds: float) -> str:
    return f"{row.instance} at {row.share}: {row.solve_seconds:.2f} s, allowed are {seconds} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small problems")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    table = Table(HEADERS)
    rows: list[Row] = []
    for instance in instances(quick):
        for share in SHARES:
            measured = measure(instance, share)
            for row in measured:
                table.row(row.cells())
            rows += measured
    for row in measure_chained(nested(8 if quick else 32)):
        table.row(row.cells())
        rows.append(row)
    failed = [] if quick else missed(rows)
    print(f"\nLimits missed: {'; '.join(failed) or 'none'}.")
    if not quick:
        records = [asdict(row) for row in rows]
        write_results("solvers-cpu", "cpu", records, time.perf_counter() - begin)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
