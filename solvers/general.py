"""The general rematerialization problem: any tensor of a graph, recomputed any number of times.

Nodes are in the order in which they are first computed. Computing one takes seconds and needs the
results of others in memory beside its own. A schedule is the order of all computations, repeated
ones included; each result is freed after its last use. Real plans are more restricted, which makes
the best schedule a bound for them. Depends on the standard library and the problem's status.
"""

from dataclasses import dataclass

from memfit.solvers.problem import Status


@dataclass(frozen=True, slots=True)
class Node:
    """One computation and its result."""

    name: str
    seconds: float
    size_bytes: int
    needs: tuple[int, ...] = ()
    """Indices of the nodes whose results it reads, all before its own."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in a topological order."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        for index, node in enumerate(self.nodes):
            if any(not 0 <= need < index for need in node.needs):
                raise ValueError(f"{node.name} needs a node that does not come before it")


@dataclass(frozen=True, slots=True)
class Schedule:
    """An order of computations, and what is known about it."""

    computed: tuple[int, ...]
    """Empty when none was found."""
    status: Status
    seconds: float
    """Of all computations."""
    peak_bytes: int
    bound_seconds: float
    """No schedule within the budget takes less."""


def describe(
    graph: Graph, computed: tuple[int, ...], status: Status, bound_seconds: float
) -> Schedule:
    """The schedule that an order makes."""
    seconds = sum(graph.nodes[v].seconds for v in computed)
    return Schedule(computed, status, seconds, peak_bytes(graph, computed), bound_seconds)


def peak_bytes(graph: Graph, computed: tuple[int, ...]) -> int:
    """Most bytes at once when each result is freed after its last use.

    Raises :class:`ValueError` for an order that reads what is not there.
    """
    born: dict[int, int] = {}
    dies: dict[tuple[int, int], int] = {}
    for position, v in enumerate(computed):
        for need in graph.nodes[v].needs:
            if need not in born:
                raise ValueError(f"{graph.nodes[v].name} comes before {graph.nodes[need].name}")
            dies[need, born[need]] = position
        born[v] = position
        dies[v, position] = position
    change = [0] * (len(computed) + 1)
    for (v, start), stop in dies.items():
        change[start] += graph.nodes[v].size_bytes
        change[stop + 1] -= graph.nodes[v].size_bytes
    peak = alive = 0
    for size in change:
        alive += size
        peak = max(peak, alive)
    return peak
