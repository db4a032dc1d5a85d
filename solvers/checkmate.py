"""The best schedule of a small graph, as a mixed integer program.

Stages are frontier advancing: stage t computes node t for the first time and before it, in order,
whatever it repeats (Jain et al., "Checkmate: Breaking the Memory Wall with Optimal Tensor
Rematerialization", MLSys 2020):

    R[t,i] in {0,1}   stage t computes i <= t             R[t,t] = 1
    S[t,i] in {0,1}   i is in memory when stage t begins  S[t,i] <= S[t-1,i] + R[t-1,i]
                                                          R[t,v] <= R[t,d] + S[t,d], d needed by v
    U[t,k] <= budget  bytes while stage t is at node k
    F[t,i,k] in [0,1] i is freed after node k of stage t  F <= R[t,k]; F <= 1 - h for each hazard h:
                                                          a later node of the stage that reads i, or
                                                          S[t+1,i]

One row a hazard in place of the paper's counted hazards makes F continuous and the relaxation
tighter. To about 50 nodes. Depends on PuLP.
"""

from collections import defaultdict
from typing import Any

from memfit.solvers import _compat
from memfit.solvers.general import Graph, Schedule, describe, peak_bytes
from memfit.solvers.problem import DEFAULT_LIMITS, Limits, Status

MOST_NODES = 80
RANGE = 1e3


def solve(graph: Graph, budget_bytes: int, limits: Limits = DEFAULT_LIMITS) -> Schedule:
    """The schedule of fewest seconds within the budget. At most ``MOST_NODES`` nodes."""
    if len(graph.nodes) > MOST_NODES:
        raise ValueError(
            f"checkmate takes at most {MOST_NODES} nodes, there are {len(graph.nodes)}"
        )
    once = tuple(range(len(graph.nodes)))
    if peak_bytes(graph, once) <= budget_bytes:
        plain = describe(graph, once, Status.OPTIMAL, 0.0)
        return describe(graph, once, Status.OPTIMAL, plain.seconds)
    model = _Model(graph, budget_bytes)
    outcome = _compat.minimise(model.program, limits.gap, limits.seconds)
    if outcome.status in (Status.INFEASIBLE, Status.UNSOLVED):
        return Schedule((), outcome.status, 0.0, 0, 0.0)
    necessary = sum(node.seconds for node in graph.nodes)
    bound = necessary + max(0.0, outcome.bound) * model.second
    return describe(graph, model.computed(), outcome.status, bound)


class _Model:
    def __init__(self, graph: Graph, budget_bytes: int) -> None:
        self.graph = graph
        self.program = _compat.program("checkmate")
        self.budget = budget_bytes
        self.unit = max(1.0, budget_bytes / RANGE)
        self.second = max(node.seconds for node in graph.nodes) or 1.0
        self.readers: dict[int, list[int]] = defaultdict(list)
        for v, node in enumerate(graph.nodes):
            for need in node.needs:
                self.readers[need].append(v)
        count = len(graph.nodes)
        self.computes: dict[tuple[int, int], Any] = {}
        self.holds: dict[tuple[int, int], Any] = {}
        for t in range(count):
            self.computes[t, t] = 1
            for i in range(t):
                self.computes[t, i] = self.program.add_variable(f"R_{t}_{i}", 0, 1, "Binary")
                self.holds[t, i] = self.program.add_variable(f"S_{t}_{i}", 0, 1, "Binary")
        self.program += _compat.total(
            graph.nodes[i].seconds / self.second * variable
            for (t, i), variable in self.computes.items()
            if i < t
        )
        for t in range(count):
            self._order(t)
            self._memory(t)

    def computed(self) -> tuple[int, ...]:
        """The order that the variables stand for."""
        return tuple(
            i
            for t in range(len(self.graph.nodes))
            for i in range(t + 1)
            if i == t or self.computes[t, i].value() > 0.5
        )

    def _order(self, t: int) -> None:
        for i in range(t):
            before = self.holds[t - 1, i] if i < t - 1 else 0
            self.program += self.holds[t, i] <= before + self.computes[t - 1, i]
        for v in range(t + 1):
            for need in self.graph.nodes[v].needs:
                self.program += self.computes[t, v] <= self.computes[t, need] + self.holds[t, need]

    def _memory(self, t: int) -> None:
        """Bytes along the stage: what it begins with, plus what it computes, less what it frees."""
        sizes = [node.size_bytes / self.unit for node in self.graph.nodes]
        alive = _compat.total(sizes[i] * self.holds[t, i] for i in range(t))
        for k in range(t + 1):
            used = self.program.add_variable(f"U_{t}_{k}", 0, self.budget / self.unit)
            self.program += used == alive + sizes[k] * self.computes[t, k]
            freed = [
                sizes[i] * free
                for i in (*self.graph.nodes[k].needs, k)
                if (free := self._freed(t, i, k)) is not None
            ]
            alive = 1 * used - _compat.total(freed)

    def _freed(self, t: int, i: int, k: int) -> Any:
        """F[t,i,k], or None where it is 0 for certain."""
        hazards = [self.computes[t, j] for j in self.readers[i] if k < j <= t]
        if t + 1 < len(self.graph.nodes):
            hazards.append(self.holds[t + 1, i])
        if any(hazard is self.computes[t, t] for hazard in hazards):
            return None
        free = self.program.add_variable(f"F_{t}_{i}_{k}", 0, 1)
        if k < t:
            self.program += free <= self.computes[t, k]
        for hazard in hazards:
            self.program += free <= 1 - hazard
        return free
