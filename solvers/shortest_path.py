"""The best schedule of a tiny graph, as a shortest path: the reference for the reference.

States are how many nodes were computed for the first time and which results are in memory; edges
compute a node (its seconds) or free a result (nothing). Dijkstra's algorithm over them needs no
formulation that could be wrong, and exponential memory. Depends on the standard library alone.
"""

import heapq

from memfit.solvers.general import Graph, Schedule, describe
from memfit.solvers.problem import Status

MOST_NODES = 12

_State = tuple[int, int]


def solve(graph: Graph, budget_bytes: int) -> Schedule:
    """The schedule of fewest seconds within the budget. At most ``MOST_NODES`` nodes."""
    count = len(graph.nodes)
    if count > MOST_NODES:
        raise ValueError(f"the shortest path takes at most {MOST_NODES} nodes, there are {count}")
    needs = [sum(1 << need for need in node.needs) for node in graph.nodes]
    best: dict[_State, float] = {(0, 0): 0.0}
    came: dict[_State, tuple[_State, int | None]] = {}
    queue: list[tuple[float, _State]] = [(0.0, (0, 0))]
    while queue:
        seconds, state = heapq.heappop(queue)
        first, present = state
        if first == count:
            return describe(graph, _path(came, state), Status.OPTIMAL, seconds)
        if best[state] < seconds:
            continue
        alive = sum(node.size_bytes for v, node in enumerate(graph.nodes) if present >> v & 1)
        moves: list[tuple[float, _State, int | None]] = []
        for v in range(count):
            if present >> v & 1:
                moves.append((seconds, (first, present & ~(1 << v)), None))
            elif v <= first and not needs[v] & ~present:
                node = graph.nodes[v]
                if alive + node.size_bytes <= budget_bytes:
                    after = (max(first, v + 1), present | 1 << v)
                    moves.append((seconds + node.seconds, after, v))
        for total, after, computed in moves:
            if total < best.get(after, float("inf")):
                best[after] = total
                came[after] = state, computed
                heapq.heappush(queue, (total, after))
    return Schedule((), Status.INFEASIBLE, 0.0, 0, 0.0)


def _path(came: dict[_State, tuple[_State, int | None]], state: _State) -> tuple[int, ...]:
    computed: list[int] = []
    while state in came:
        state, node = came[state]
        if node is not None:
            computed.append(node)
    return tuple(reversed(computed))
