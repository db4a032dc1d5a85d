"""The references for small graphs: they agree with each other, and with what is counted by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.solvers import Limits, Status, checkmate, shortest_path
from memfit.solvers.general import Graph, Node, peak_bytes

some = settings(max_examples=60, derandomize=True, deadline=None, database=None)
EXACT = Limits(gap=0.0)


def training(seconds: list[float], sizes: list[int]) -> Graph:
    """A chain and its backward: a gradient reads the node's input and the gradient after it."""
    count = len(seconds)
    forward = [
        Node(f"f{i}", s, b, (i - 1,) if i else ())
        for i, (s, b) in enumerate(zip(seconds, sizes, strict=True))
    ]
    backward = []
    for i in reversed(range(count)):
        own = {i - 1} if i else set()
        later = {2 * count - 2 - i} if i < count - 1 else {i}
        needs = tuple(sorted(own | later))
        backward.append(Node(f"b{i}", 2 * seconds[i], sizes[i - 1] if i else 1, needs))
    return Graph((*forward, *backward))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    nodes: list[Node] = []
    for v in range(draw(st.integers(2, 7))):
        needs = draw(st.lists(st.integers(0, v - 1), unique=True, max_size=2)) if v else []
        seconds, size = draw(st.integers(0, 9)), draw(st.integers(1, 8))
        nodes.append(Node(f"n{v}", float(seconds), size, tuple(sorted(needs))))
    return Graph(tuple(nodes))


@some
@given(graphs(), st.integers(-8, 0))
def test_the_program_finds_what_the_shortest_path_does(graph: Graph, less: int) -> None:
    once = tuple(range(len(graph.nodes)))
    budget = peak_bytes(graph, once) + less
    best, found = shortest_path.solve(graph, budget), checkmate.solve(graph, budget, EXACT)
    assert found.status is best.status
    assert found.seconds == pytest.approx(best.seconds)
    if found.computed:
        assert max(found.peak_bytes, best.peak_bytes) <= budget
        assert found.bound_seconds == pytest.approx(best.bound_seconds)


def test_a_chain_is_recomputed_as_counted_by_hand() -> None:
    graph = training([1.0, 1.0, 1.0], [4, 4, 4])
    # Forward f0 f1 f2; b2 reads f2 and f1, beside f0: 16 bytes.
    assert peak_bytes(graph, (0, 1, 2, 3, 4, 5)) == 16
    everything = shortest_path.solve(graph, 16)
    assert everything.seconds == 3 + 6
    # Without f0 until b1 asks for it, there are 12.
    less = shortest_path.solve(graph, 12)
    assert (less.seconds, less.peak_bytes) == (3 + 6 + 1, 12)
    assert checkmate.solve(graph, 12, EXACT).seconds == pytest.approx(less.seconds)
    assert shortest_path.solve(graph, 11).status is Status.INFEASIBLE
    assert checkmate.solve(graph, 11, EXACT).status is Status.INFEASIBLE


def test_what_makes_no_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="b needs a node that does not come before it"):
        Graph((Node("a", 1.0, 1), Node("b", 1.0, 1, (1,))))
    graph = training([1.0, 1.0], [1, 1])
    with pytest.raises(ValueError, match="f1 comes before f0"):
        peak_bytes(graph, (1, 0))
    long = Graph(tuple(Node(str(v), 1.0, 1) for v in range(100)))
    with pytest.raises(ValueError, match="at most 80 nodes, there are 100"):
        checkmate.solve(long, 1)
    with pytest.raises(ValueError, match="at most 12 nodes, there are 100"):
        shortest_path.solve(long, 1)
