"""Regions that are alike: what an option does to one is what it does to the others, elsewhere.

A model of 80 equal layers has as many regions, whose options differ in the numbers of storages and
in clocks alone. They are worked out for the first and moved. Depends on the step's records and on
the programs of regions.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from memfit.planner.recompute import Copy, Effect, Recomputation
from memfit.planner.regions import Region
from memfit.planner.selective import RegionProgram
from memfit.planner.step_graph import StepGraph


@dataclass(frozen=True, slots=True)
class Move:
    """The way from one region to another that is like it."""

    storages: Mapping[int, int]
    forward: int
    """Clocks between the forwards of the two."""
    backward: int
    """Clocks between their backwards."""
    backward_start: int
    """Clock at which the backward of the first begins."""

    def clock(self, clock: int) -> int:
        """Where a clock of the first region's forward or backward is in the other's."""
        return clock + (self.backward if clock >= self.backward_start else self.forward)

    def holds(self, effect: Effect) -> dict[int, int]:
        """:attr:`Effect.holds` of the other region."""
        return {self.storages[s]: self.clock(until) for s, until in effect.holds.items()}

    def effect(self, effect: Effect) -> Effect:
        """An effect on the first region, as it is on the other."""
        assert effect.chain is None, "neighbours in a segment are not moved"
        return Effect(
            self.holds(effect),
            tuple((size, self.clock(a), self.clock(b)) for size, a, b in effect.extra),
            tuple(map(self._recomputation, effect.recomputations)),
        )

    def _recomputation(self, recomputation: Recomputation) -> Recomputation:
        ops = recomputation.ops
        moved = (
            range(ops.start + self.forward, ops.stop + self.forward)
            if isinstance(ops, range)
            else tuple(i + self.forward for i in ops)
        )
        copies = tuple(map(self._copy, recomputation.copies))
        return Recomputation(self.clock(recomputation.at), moved, copies)

    def _copy(self, copy: Copy) -> Copy:
        storage = self.storages[copy.storage] if copy.storage >= 0 else copy.storage
        return replace(copy, storage=storage, until=self.clock(copy.until) if copy.until else 0)


def move_between(
    step: StepGraph,
    one: tuple[Region, RegionProgram],
    other: tuple[Region, RegionProgram],
) -> Move:
    """The way between two regions of equal :func:`likeness`."""
    (a, a_program), (b, b_program) = one, other
    storages = dict(zip(step.calls[a.call].inputs, step.calls[b.call].inputs, strict=True))
    storages |= zip(a_program.storages, b_program.storages, strict=True)
    between = b.start - a.start, b.backward_start - a.backward_start
    return Move(storages, *between, a.backward_start)


def likeness(step: StepGraph, region: Region, compiled: RegionProgram) -> Hashable:
    """Equal for regions whose options do the same; None for one that is like no other.

    It holds all that an effect on the region is made of, places counted from its own.
    """
    start, stop, place = region.start, region.stop, region.place

    def storage(index: int) -> tuple[int, bool, int, int]:
        s = step.storages[index]
        inside = s.born >= start
        born, released = (s.born - start, min(s.released, stop) - start) if inside else (-1, 0)
        return s.size_bytes, s.kind.resident, born, released

    saved = [step.saved[i] for i in region.saved]
    if any(stop < c < region.backward_start for s in saved for c in (s.released, s.used_until)):
        return None
    numbers = {s: n for n, s in enumerate(compiled.storages)}
    first = min((s.order for s in saved if s.unpacked is not None), default=0)
    return (
        compiled.program,
        region.backward_stop - region.backward_start,
        tuple(numbers.get(s, -1) for s in step.calls[region.call].inputs),
        tuple(map(storage, (*compiled.storages, *step.calls[region.call].inputs))),
        tuple((op.seconds, op.workspace_bytes) for op in step.ops[start:stop]),
        tuple(
            (
                place(s.packed),
                place(s.released),
                place(s.used_until),
                -1 if s.unpacked is None else place(s.unpacked),
                s.order - first,
                s.sample_bytes,
                s.own,
            )
            for s in saved
        ),
    )
