"""How far a plan is from the best that can be done, as seconds that nothing goes below.

Two bounds: of all choices that the plan's own regions and options allow, by the solver's proof; and
where the step is small enough, of every schedule there is, in which any tensor may be recomputed
any number of times (see :mod:`memfit.solvers.checkmate`). The graph of that problem leaves out what
would only make schedules slower: workspace, references that outlive the last reader, and that the
results of one op come together. Depends on the step's records and on the solvers.
"""

from collections import defaultdict

from memfit.planner.document import Bounds
from memfit.planner.simulate import round_up
from memfit.planner.solving import Outcome
from memfit.planner.step_graph import StepGraph
from memfit.solvers import AUTO, SOLVERS, Solution, Status
from memfit.solvers.checkmate import MOST_NODES
from memfit.solvers.checkmate import solve as solve_general
from memfit.solvers.general import Graph, Node


def find_bounds(outcome: Outcome) -> Bounds:
    """The bounds for a plan, in shares of the step's seconds as its overhead is."""
    task = outcome.task
    seconds = task.step.seconds or 1.0
    solution = _proved(outcome)
    graph = general_graph(task.step, task.target.device.allocation_bytes)
    general = None
    note = f"the step has {len(graph.nodes)} results; schedules are bounded up to {MOST_NODES}"
    if len(graph.nodes) <= MOST_NODES:
        room = task.problem.budget_bytes - task.resident_bytes
        schedule = solve_general(graph, room, task.limits)
        if schedule.status is Status.UNSOLVED:
            note = f"no bound was found within {task.limits.seconds:g} s"
        elif schedule.status is not Status.INFEASIBLE:
            general = max(0.0, schedule.bound_seconds - seconds) / seconds
            note = f"by the general program: {schedule.status.value}"
    return Bounds(solution.bound_seconds / seconds, solution.solver, general, note)


def _proved(outcome: Outcome) -> Solution:
    """A solution of the plan's problem with the highest bound that is known."""
    if outcome.solution.bound_seconds or not outcome.solution.recompute_seconds:
        return outcome.solution
    return SOLVERS[AUTO](outcome.task.problem, outcome.task.limits)


def general_graph(step: StepGraph, allocation_bytes: int = 1) -> Graph:
    """The step as nodes that may be computed in any order, one for each result that is not a view.

    What an op writes in place is a node of no size; what is there before the step needs no node.
    """
    nodes: list[Node] = []
    versions: dict[int, list[int]] = defaultdict(list)
    for index, op in enumerate(step.ops):
        needs = tuple(sorted({n for s in op.inputs for n in versions[s]}))
        made = [s for s in dict.fromkeys(op.outputs) if step.storages[s].born == index]
        made.sort(key=lambda s: -step.storages[s].size_bytes)
        seconds = op.seconds
        for storage in made:
            size = round_up(step.storages[storage].size_bytes, allocation_bytes)
            versions[storage] = [len(nodes)]
            # Of several results the largest takes the time.
            nodes.append(Node(f"{op.name} {index}", seconds, size, needs))
            seconds = 0.0
        written = [s for s in op.written if s not in made]
        if written or (not made and op.seconds):
            for storage in written:
                versions[storage].append(len(nodes))
            nodes.append(Node(f"{op.name} {index}", seconds, 0, needs))
    end = len(step.ops)
    last = {
        n
        for s, storage in enumerate(step.storages)
        if storage.released >= end and not storage.kind.resident
        for n in versions[s]
    }
    return Graph((*nodes, Node("end", 0.0, 0, tuple(sorted(last)))))
