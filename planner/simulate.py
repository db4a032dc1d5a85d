"""Replays the captured step under a plan and returns the bytes alive at every op, and the peak.

Every byte figure that a plan states comes from here. A *slot* is one op that runs, recomputed ones
included, in the order of the planned step. Depends on the step's records and on ``recompute`` for
what the actions do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memfit.planner.recompute import Effect, Recomputation, saved_holds
from memfit.planner.regions import Region
from memfit.planner.step_graph import StepGraph

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Allocations:
    """Everything that the planned step has allocated, column by column."""

    sizes: Integers
    first: Integers
    """Slot of the op that allocates."""
    end: Integers
    """First slot in which the allocation is gone."""
    storage: Integers
    """Storage of the step that it holds; -1 for a generator state."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Live bytes of a planned step."""

    alive_bytes: Integers
    """Bytes alive in each slot, resident ones included."""
    ops: Integers
    """Op that runs in each slot."""
    recomputed: Integers
    """Region whose recomputation a slot belongs to; -1 for the step's own ops."""
    allocations: Allocations

    @property
    def peak_slot(self) -> int:
        """First slot in which the most bytes are alive."""
        return int(self.alive_bytes.argmax())

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once, resident ones included."""
        return int(self.alive_bytes.max())

    def alive_at(self, slot: int) -> list[tuple[int, int]]:
        """``(storage, bytes)`` of what is alive in ``slot``, largest first."""
        a = self.allocations
        alive = np.flatnonzero((a.first <= slot) & (slot < a.end))
        alive = alive[np.argsort(-a.sizes[alive], kind="stable")]
        return [(int(a.storage[i]), int(a.sizes[i])) for i in alive]


def simulate(
    step: StepGraph,
    regions: Sequence[Region],
    effects: Sequence[Effect],
    allocation_bytes: int = 1,
) -> Timeline:
    """Timeline of ``step`` when region ``r`` runs as ``effects[r]`` says.

    ``allocation_bytes`` is the multiple to which the device's allocator rounds sizes up.
    """
    slots = _Slots(step, effects)
    allocations = _allocations(step, regions, effects, slots, allocation_bytes)
    changes = np.zeros(slots.count + 1, dtype=np.int64)
    np.add.at(changes, allocations.first, allocations.sizes)
    np.add.at(changes, allocations.end, -allocations.sizes)
    ops = np.zeros(slots.count, dtype=np.int64)
    ops[slots.of_op(np.arange(len(step.ops)))] = np.arange(len(step.ops))
    recomputed = np.full(slots.count, -1, dtype=np.int64)
    for region, recomputation, first in slots.recomputations:
        span = slice(first, first + len(recomputation.ops))
        ops[span], recomputed[span] = recomputation.ops, region
    workspace = np.array([op.workspace_bytes for op in step.ops], dtype=np.int64)
    alive = np.cumsum(changes[:-1]) + workspace[ops]
    return Timeline(alive, ops, recomputed, allocations)


def certain_until(step: StepGraph, regions: Sequence[Region]) -> Integers:
    """Clock until which each storage is alive whatever the regions do."""
    until = np.array([s.released for s in step.storages], dtype=np.int64)
    planned = {index for region in regions for index in region.saved}
    outside = tuple(i for i in range(len(step.saved)) if i not in planned)
    for storage, clock in saved_holds(step, outside).items():
        until[storage] = max(until[storage], clock)
    return until


def round_up(size_bytes: int, multiple: int) -> int:
    """``size_bytes`` as the allocator takes it."""
    return -(-size_bytes // multiple) * multiple


class _Slots:
    """Where the step's own ops and the recomputed ones lie when recomputations are inserted."""

    def __init__(self, step: StepGraph, effects: Sequence[Effect]) -> None:
        found = [
            (recomputation, region)
            for region, effect in enumerate(effects)
            for recomputation in effect.recomputations
        ]
        found.sort(key=lambda item: item[0].at)
        self._at = np.array([r.at for r, _ in found], dtype=np.int64)
        self._inserted = np.zeros(len(found) + 1, dtype=np.int64)
        self._inserted[1:] = np.cumsum([len(r.ops) for r, _ in found])
        self.count = len(step.ops) + int(self._inserted[-1])
        self.recomputations: list[tuple[int, Recomputation, int]] = [
            (region, r, r.at + int(self._inserted[i])) for i, (r, region) in enumerate(found)
        ]

    def of_op(self, op: Integers | int) -> Integers:
        """Slots of ops of the step itself."""
        return np.asarray(op + self._inserted[np.searchsorted(self._at, op, side="right")])

    def of_release(self, clock: Integers | int) -> Integers:
        """First slots in which storages released at ``clock`` are gone: before a recomputation."""
        return np.asarray(clock + self._inserted[np.searchsorted(self._at, clock, side="left")])


def _allocations(
    step: StepGraph,
    regions: Sequence[Region],
    effects: Sequence[Effect],
    slots: _Slots,
    allocation_bytes: int,
) -> Allocations:
    until = certain_until(step, regions)
    for effect in effects:
        for storage, clock in effect.holds.items():
            until[storage] = max(until[storage], clock)
    born = np.array([max(0, s.born) for s in step.storages], dtype=np.int64)
    resident = np.array([s.kind.resident for s in step.storages], dtype=bool)
    first = np.where(resident, 0, slots.of_op(born))
    end = np.where(resident, slots.count, slots.of_release(until))
    rows = [(s.size_bytes, a, b, i) for i, (s, a, b) in enumerate(
        zip(step.storages, first.tolist(), end.tolist(), strict=True))]  # fmt: skip
    for effect in effects:
        for size, start, stop in effect.extra:
            rows.append((size, int(slots.of_op(start)), int(slots.of_release(stop)), -1))
    for _, recomputation, at in slots.recomputations:
        for copy in recomputation.copies:
            used = int(slots.of_release(copy.until)) if copy.until else 0
            rows.append((copy.size_bytes, at + copy.first, max(at + copy.last, used), copy.storage))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    sizes = -(-columns[0] // allocation_bytes) * allocation_bytes
    return Allocations(sizes, columns[1], columns[2], columns[3])
