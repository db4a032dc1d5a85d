"""Makes the timeline of a plan: what is alive in every slot of the planned step, by what it is.

The bytes are the simulator's; this file only tells them apart and names them. Depends on the
planner's records and on the simulator.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memfit.planner import timeline
from memfit.planner.places import Places
from memfit.planner.program import short_name
from memfit.planner.simulate import Integers, Timeline
from memfit.planner.solving import Outcome
from memfit.planner.step_graph import Call, Kind, Phase, StepGraph
from memfit.planner.timeline import AliveTensor, MemoryTimeline, encode_column

_NUMBER = {name: number for number, name in enumerate(timeline.KINDS)}
# Activations are told apart by when they are made and how long they live.
_OF_STORAGES = {
    Kind.PARAMETER: timeline.PARAMETERS,
    Kind.BUFFER: timeline.OTHER,
    Kind.OPTIMIZER: timeline.OPTIMIZER,
    Kind.BATCH: timeline.BATCH,
    Kind.CONSTANT: timeline.OTHER,
    Kind.WORKSPACE: timeline.WORKSPACE,
    Kind.GRADIENT: timeline.GRADIENTS,
    Kind.KEPT_GRADIENT: timeline.GRADIENTS,
    Kind.ACTIVATION: timeline.TEMPORARIES,
    Kind.NUMBER: timeline.OTHER,
    Kind.BUCKET: timeline.GRADIENTS,
    Kind.WHOLE_PARAMETER: timeline.GATHERED,
    Kind.COLLECTIVE: timeline.COLLECTIVES,
}
# A whole part of a dotted name, the 0 of "h.0.mlp.fc1", or the number of an op's result.
_PART = re.compile(r"(?<![^.\[])\d+(?![^.\]])")


def make_timeline(outcome: Outcome) -> MemoryTimeline:
    """The timeline of the planned step, with everything that is alive at its peak."""
    step, planned = outcome.task.step, outcome.timeline
    phases = _phases(step, planned)
    kinds = _kinds(step, planned, phases.get(Phase.BACKWARD.value, len(planned.ops)))
    places = Places(step, outcome.task.regions)
    moments = _Words(map(places.of_slot, planned.ops.tolist(), planned.recomputed.tolist()))
    ops = _Words(short_name(step.ops[op].name) for op in planned.ops.tolist())
    return MemoryTimeline(
        slots=len(planned.alive_bytes),
        phases=phases,
        kinds={
            name: encode_column(row.tolist())
            for name, row in zip(timeline.KINDS, _bytes_by_kind(step, planned, kinds), strict=True)
            if row.any()
        },
        moments=tuple(moments.known),
        moment=encode_column(moments.indices),
        ops=tuple(ops.known),
        op=encode_column(ops.indices),
        at_peak=_grouped(_at_peak(step, planned, kinds, places)),
    )


class _Words:
    """Texts that repeat, as indices into the different ones."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.known: dict[str, int] = {}
        self.indices = [self.known.setdefault(text, len(self.known)) for text in texts]


def _phases(step: StepGraph, planned: Timeline) -> dict[str, int]:
    """First slot of each phase; what is recomputed belongs to the backward."""
    phases = {}
    for phase in Phase:
        of_op = np.array([op.phase is phase for op in step.ops], dtype=bool)
        again = planned.recomputed >= 0
        within = of_op[planned.ops] & ~again | (again if phase is Phase.BACKWARD else False)
        if within.any():
            phases[phase.value] = int(within.argmax())
    return phases


# -- bytes by what they are ----------------------------------------------------------------------


def _kinds(step: StepGraph, planned: Timeline, backward: int) -> Integers:
    """Numbers of the kinds of all allocations; the backward begins in the slot ``backward``."""
    a = planned.allocations
    of_storages = np.array([_NUMBER[_OF_STORAGES[s.kind]] for s in step.storages])
    kinds = np.where(a.storage >= 0, of_storages[a.storage], _NUMBER[timeline.OTHER])
    activation = np.array([s.kind is Kind.ACTIVATION for s in step.storages], dtype=bool)
    activation = (a.storage >= 0) & activation[a.storage]
    kinds[activation & (a.first < backward) & (a.end > backward)] = _NUMBER[timeline.KEPT]
    kinds[activation & _is_of_the_loss(step)[a.storage]] = _NUMBER[timeline.LOSS]
    # The simulator lists the step's own allocations first, each storage once.
    again = np.arange(len(kinds)) >= len(step.storages)
    kinds[activation & again] = _NUMBER[timeline.RECOMPUTED]
    return kinds


def _bytes_by_kind(step: StepGraph, planned: Timeline, kinds: Integers) -> Integers:
    """A row of bytes in each slot for each of the kinds."""
    a = planned.allocations
    changes = np.zeros((len(timeline.KINDS), len(planned.ops) + 1), dtype=np.int64)
    np.add.at(changes, (kinds, a.first), a.sizes)
    np.add.at(changes, (kinds, a.end), -a.sizes)
    alive: Integers = changes.cumsum(axis=1)[:, :-1]
    workspace = np.array([op.workspace_bytes for op in step.ops], dtype=np.int64)
    alive[_NUMBER[timeline.WORKSPACE]] += workspace[planned.ops]
    return alive


def _is_of_the_loss(step: StepGraph) -> npt.NDArray[np.bool_]:
    """Whether each storage is of the logits, of the loss or of its backward.

    The loss is what runs after the last module call; its backward is over when the backward first
    asks for a tensor that a module call saved.
    """
    forward_ops = sum(op.phase is Phase.FORWARD for op in step.ops)
    born = np.array([s.born for s in step.storages], dtype=np.int64)
    head = _last_call(step, forward_ops)
    if head is None:
        return np.zeros(len(born), dtype=bool)
    unpacked = (s.unpacked for s in step.saved[: head.saved.stop] if s.unpacked is not None)
    found = (born >= head.stop) & (born < min(unpacked, default=len(step.ops)))
    given = [s for op in step.ops[head.stop : forward_ops] for s in op.inputs]
    found[given] |= born[given] >= head.start
    return found


def _last_call(step: StepGraph, forward_ops: int) -> Call | None:
    """The last module call after which its callers run ops of their own; None without such ops."""
    children = defaultdict(list)
    for index, call in enumerate(step.calls):
        children[call.parent].append(index)
    caller = -1
    while children[caller]:
        caller = max(children[caller], key=lambda c: (step.calls[c].stop, c))
        if step.calls[caller].stop < forward_ops:
            return step.calls[caller]
    return None


# -- tensors at the peak -------------------------------------------------------------------------


class _Named(NamedTuple):
    """An allocation, but for its size."""

    module: str
    name: str
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""


def _at_peak(
    step: StepGraph, planned: Timeline, kinds: Integers, places: Places
) -> Iterator[tuple[_Named, int]]:
    """What is alive at the peak, with its bytes."""
    a, slot = planned.allocations, planned.peak_slot
    namer = _Namer(step, places)
    for index in np.flatnonzero((a.first <= slot) & (slot < a.end) & (a.sizes > 0)).tolist():
        kind, storage = timeline.KINDS[kinds[index]], int(a.storage[index])
        if storage < 0:
            named = _Named("", "generator states and samples", kind)
        else:
            named = namer.name(storage, kind)
        yield named, int(a.sizes[index])
    op = int(planned.ops[slot])
    if size_bytes := step.ops[op].workspace_bytes:
        name = short_name(step.ops[op].name)
        yield _Named(places.module(op), name, timeline.WORKSPACE), size_bytes


class _Namer:
    """Names storages after what they hold, or the op that made them."""

    def __init__(self, step: StepGraph, places: Places) -> None:
        self._step = step
        self._places = places
        self._positions: dict[int, dict[int, int]] = {}
        """Of the results of an op, by their storages: an optimizer's has hundreds."""

    def name(self, index: int, kind: str) -> _Named:
        storage = self._step.storages[index]
        if storage.born < 0 or storage.name:
            module, _, name = storage.name.rpartition(".")
            if storage.kind is Kind.OPTIMIZER:  # its name comes after the parameter's
                module, _, parameter = module.rpartition(".")
                name = f"{parameter}.{name}"
            name = name or storage.kind.value
        else:
            module = self._places.module(storage.born)
            name = short_name(self._step.ops[storage.born].name)
            if position := self._position(index, storage.born):
                name += f"[{position}]"
        return _Named(module, name, kind, storage.shape, storage.dtype)

    def _position(self, index: int, op: int) -> int:
        if op not in self._positions:
            outputs = self._step.ops[op].outputs
            self._positions[op] = {s: position for position, s in enumerate(outputs)}
        return self._positions[op].get(index, 0)


def _grouped(tensors: Iterable[tuple[_Named, int]]) -> tuple[AliveTensor, ...]:
    """Tensors that differ in numbers only, together; largest first."""
    groups: dict[tuple[_Named, int], list[_Named]] = defaultdict(list)
    pattern = cache(lambda text: _PART.sub("*", text))
    for named, size_bytes in tensors:
        alike = named._replace(module=pattern(named.module), name=pattern(named.name))
        groups[alike, size_bytes].append(named)
    found = [
        AliveTensor(
            module=_range({named.module for named in group}),
            name=_range({named.name for named in group}),
            kind=alike.kind,
            shape=alike.shape,
            dtype=alike.dtype,
            count=len(group),
            size_bytes=size_bytes,
        )
        for (alike, size_bytes), group in groups.items()
    ]
    return tuple(sorted(found, key=lambda t: (-t.total_bytes, t.path)))


def _range(names: Collection[str]) -> str:
    """``a.0-3.b`` for ``a.0.b`` to ``a.3.b``."""
    numbers = zip(*(map(int, _PART.findall(name)) for name in names), strict=True)
    ranges = iter([(min(n), max(n)) for n in numbers])

    def span(_: "re.Match[str]") -> str:
        first, last = next(ranges)
        return str(first) if first == last else f"{first}-{last}"

    return _PART.sub(span, next(iter(names)))
