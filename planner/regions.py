"""Finds the regions of a captured step: the repeated blocks, and what lies around them.

Blocks are found from the graph, not from names: module calls of one list or one type that feed each
other directly and together hold most of what their caller saves for the backward. The innermost
such chain in which types repeat is taken. What is left over becomes a region too where recomputing
it would free a noticeable share. A region that cannot be run twice safely has a reason and is kept.
Depends on networkx for the dataflow.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

import networkx as nx

from memfit.planner.step_graph import Phase, StepGraph

# A chain is the blocks of its caller when it frees at least this share of what the caller could
# free.
_CHAIN_SHARE = 0.5
# A leftover module is a region when it could free at least this share of what the whole step saves.
_LEFTOVER_SHARE = 0.01
# Above all clocks: sets places in a backward apart from those in a forward.
_BACKWARD = 1 << 62


@dataclass(frozen=True, slots=True)
class Region:
    """One module call that is planned as a whole."""

    name: str
    """FQN of the module."""
    call: int
    start: int
    stop: int
    """Clocks of its forward."""
    saved: range
    """Tensors that autograd saves in it."""
    backward_start: int
    backward_stop: int
    """Clocks at which the backward first asks for one of them, and has released the last."""
    kind: int
    """Equal for regions that run the same ops on the same shapes."""
    kept_because: str = ""
    """Why it can only be kept; empty when it can be recomputed."""

    def place(self, clock: int) -> int:
        """A clock of its forward or backward, counted from where that begins."""
        if clock <= self.stop:
            return clock - self.start
        return _BACKWARD + clock - self.backward_start


def find_regions(step: StepGraph, gathered: Sequence[str] = ()) -> tuple[Region, ...]:
    """Regions of the step in forward order; they do not overlap.

    ``gathered`` are modules whose parameters are there in their own forward and backward only.
    """
    tree = _CallTree(step)
    calls = sorted(tree.choose(0), key=lambda c: step.calls[c].start) if step.calls else []
    kinds: dict[object, int] = {}
    times = Counter(call.module for call in step.calls)
    times.subtract(step.calls[call].module for call in calls)
    writers = _writers(step)
    found = [
        _region(
            step,
            call,
            kinds.setdefault(_signature(step, call), len(kinds)),
            times[step.calls[call].module],
            writers,
        )
        for call in calls
    ]
    for r, region in enumerate(found):
        if inner := [name for name in gathered if name.startswith(f"{region.name}.")]:
            found[r] = replace(region, kept_because=f"the weights of {inner[0]} are gathered apart")
    return tuple(found)


def find_lead(step: StepGraph, regions: Sequence[Region], storage: int) -> Region | None:
    """The module call outside of all regions that makes a storage; None if no such one does."""
    call = step.ops[step.storages[storage].born].call
    record = step.calls[call]
    if call <= 0 or any(r.start < record.stop and record.start < r.stop for r in regions):
        return None
    times = sum(other.module == record.module for other in step.calls) - 1
    return _region(step, call, -1, times, _writers(step))


def _region(
    step: StepGraph, call: int, kind: int, other_calls: int, writers: Sequence[int]
) -> Region:
    record = step.calls[call]
    asked = [s for i in record.saved if (s := step.saved[i].unpacked) is not None]
    return Region(
        name=record.module,
        call=call,
        start=record.start,
        stop=record.stop,
        saved=record.saved,
        backward_start=min(asked, default=len(step.ops)),
        backward_stop=max((step.saved[i].released for i in record.saved), default=len(step.ops)),
        kind=kind,
        kept_because=_why_kept(step, call, other_calls, writers),
    )


class _CallTree:
    """Module calls with what each could free, and the choice among them."""

    def __init__(self, step: StepGraph) -> None:
        self._step = step
        self._children: dict[int, list[int]] = defaultdict(list)
        for index, call in enumerate(step.calls):
            self._children[call.parent].append(index)
        self._freed = [freed_bytes(step, call) for call in range(len(step.calls))]

    def choose(self, call: int) -> list[int]:
        """Calls below ``call`` (or itself) that become regions."""
        chain = self._chain(call)
        chosen = []
        for child in self._children[call]:
            inner = self.choose(child)
            if inner and (child not in chain or self._has_chain(child)):
                chosen += inner
            elif child in chain:
                chosen.append(child)
        if chosen or call == 0:
            return chosen
        noticeable = self._freed[call] >= max(1, _LEFTOVER_SHARE * self._freed[0])
        return [call] if noticeable and self._in_backward(call) else []

    def _has_chain(self, call: int) -> bool:
        return bool(self._chain(call)) or any(map(self._has_chain, self._children[call]))

    def _in_backward(self, call: int) -> bool:
        saved = self._step.calls[call].saved
        return any(self._step.saved[i].unpacked is not None for i in saved)

    def _chain(self, call: int) -> set[int]:
        """The blocks among the calls that ``call`` makes; empty when there are none."""
        alike: dict[str, list[int]] = defaultdict(list)
        for child in self._children[call]:
            if self._freed[child] and self._in_backward(child):
                record = self._step.calls[child]
                container, _, name = record.module.rpartition(".")
                alike[container if name.isdigit() else record.type_name].append(child)
        for members in alike.values():
            share = sum(self._freed[m] for m in members) / max(1, self._freed[call])
            types = {self._step.calls[m].type_name for m in members}
            if (
                len(members) > len(types)
                and share >= _CHAIN_SHARE
                and self._is_chain(call, members)
            ):
                return set(members)
        return set()

    def _is_chain(self, call: int, members: list[int]) -> bool:
        flow = _dataflow(self._step, call, self._children[call])
        others = (c for c in self._children[call] if self._freed[c] and c not in members)
        flow.remove_nodes_from(list(others))
        return all(nx.has_path(flow, a, b) for a, b in pairwise(members))


def _dataflow(step: StepGraph, call: int, children: list[int]) -> nx.DiGraph:
    """Which of the calls that ``call`` makes feed which; loose ops are nodes of their own."""
    owner: dict[int, object] = {}
    for child in children:
        owner.update(dict.fromkeys(range(step.calls[child].start, step.calls[child].stop), child))
    flow = nx.DiGraph()
    flow.add_nodes_from(children)
    producer: dict[int, object] = {}
    for index in range(step.calls[call].start, step.calls[call].stop):
        node = owner.get(index, ("op", index))
        for storage in step.ops[index].inputs:
            if (source := producer.get(storage, node)) != node:
                flow.add_edge(source, node)
        made = (s for s in step.ops[index].outputs if step.storages[s].born == index)
        for storage in (*made, *step.ops[index].written):
            producer[storage] = node
    return flow


def freed_bytes(step: StepGraph, call: int) -> int:
    """Bytes that recomputing a call would not have to keep: saved in it, made in it."""
    record = step.calls[call]
    saved = {step.saved[i].storage for i in record.saved}
    inside = (s for s in map(step.storages.__getitem__, saved) if s.born >= record.start)
    return sum(s.size_bytes for s in inside)


def _why_kept(step: StepGraph, call: int, other_calls: int, writers: Sequence[int]) -> str:
    """Why a call cannot be run a second time in the backward; empty if it can.

    ``other_calls`` is how often its module is called beside the calls that are regions,
    ``writers`` are the ops of the forward that change something in place.
    """
    record = step.calls[call]
    if other_calls:
        return "called elsewhere in the step, too"
    if record.unreadable:
        return f"given {record.unreadable}"
    for inner in takewhile(lambda c: c.start <= record.stop, step.calls[call:]):
        if inner.state and inner.stop <= record.stop:
            return f"{inner.module} {inner.state}"
    for index in range(record.start, record.stop):
        for storage in step.ops[index].written:
            if step.storages[storage].born < record.start:
                kind = step.storages[storage].kind.value
                return f"{step.ops[index].name} changes a {kind} from outside in place"
    read = {
        s
        for op in step.ops[record.start : record.stop]
        for s in op.inputs
        if step.storages[s].born < record.start
    }
    for index in writers[bisect_left(writers, record.stop) :]:
        if not read.isdisjoint(step.ops[index].written):
            return f"{step.ops[index].name} changes in place what the region reads, after it"
    return ""


def _writers(step: StepGraph) -> list[int]:
    """The ops of the forward that change something in place."""
    forward = takewhile(lambda op: op.phase is Phase.FORWARD, step.ops)
    return [index for index, op in enumerate(forward) if op.written]


def _signature(step: StepGraph, call: int) -> object:
    """Equal for calls that do the same: ops, shapes, dataflow and saved tensors."""
    record = step.calls[call]
    local: dict[int, object] = {}

    def name(storage: int) -> object:
        record_ = step.storages[storage]
        inside = record_.born >= record.start
        return local.setdefault(
            storage, (len(local), inside, record_.size_bytes, record_.kind.resident)
        )

    ops = tuple(
        (op.signature, tuple(map(name, op.inputs)), tuple(map(name, op.outputs)))
        for op in step.ops[record.start : record.stop]
        if op.phase is Phase.FORWARD
    )
    saved = tuple(
        (step.saved[i].packed - record.start, name(step.saved[i].storage)) for i in record.saved
    )
    return ops, saved
