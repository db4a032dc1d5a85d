"""Which tensors a selective region may keep: the sets that are worth offering to the solver.

All subsets are too many. Tensors that one op makes stand or fall together, and small neighbours in
regions of very many; sets are then grown and shrunk by the recompute seconds that a byte is worth,
and all subsets of the most valuable tensors are tried. Of what comes out, the choices that no other
beats in stored bytes, bytes in the backward and seconds at once are thinned to a number that the
integer program takes easily: those that are best at some price of memory, then the lower convex
hulls of seconds over stored bytes under several ceilings on the bytes in the backward, for budgets
in which the working set is what is tight. Depends on the effects of the action ``selective``.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import chain, combinations, pairwise

import numpy as np

from memfit.planner.program import Program
from memfit.planner.recompute import Effect
from memfit.planner.regions import Region
from memfit.planner.selective import RegionProgram, selective
from memfit.planner.step_graph import StepGraph

# Tensors of which all subsets are tried.
_SUBSETS_OF = 6
_MOST_UNITS = 64
_CEILINGS = 6
_LEAN = 24

KeptSet = frozenset[int]


@dataclass(frozen=True, slots=True)
class _Candidate:
    kept: KeptSet
    stored_bytes: int
    backward_bytes: int
    seconds: float


def kept_sets(
    step: StepGraph,
    region: Region,
    compiled: RegionProgram,
    rng_state_bytes: int,
    limit: int,
) -> tuple[KeptSet, ...]:
    """At most ``limit`` sets of storages of the region's program, the largest first."""
    search = _Search(step, region, compiled, rng_state_bytes)
    return _sorted(_thinned(_pareto(search.useful()), limit))


def lean_sets(
    step: StepGraph, region: Region, compiled: RegionProgram, rng_state_bytes: int
) -> tuple[KeptSet, ...]:
    """A few sets for the smallest budgets, the same whatever the ops cost.

    What fits must not change with the noise of measured seconds; bytes moved stand for them here.
    """
    ops = list(step.ops)
    for index in range(region.start, region.stop):
        ops[index] = replace(ops[index], seconds=float(1 + ops[index].moved_bytes))
    by_bytes = replace(step, ops=tuple(ops), recomputation_seconds=0.0)
    search = _Search(by_bytes, region, compiled, rng_state_bytes)
    by_peak = sorted(_pareto(search.grown()), key=lambda c: (c.backward_bytes, c.stored_bytes))
    picked = {round(i) for i in np.linspace(0, len(by_peak) - 1, min(_LEAN, len(by_peak)))}
    return _sorted([by_peak[i] for i in sorted(picked)])


def _sorted(candidates: Sequence["_Candidate"]) -> tuple[KeptSet, ...]:
    return tuple(c.kept for c in sorted(candidates, key=lambda c: -c.stored_bytes))


class _Search:
    """Tries sets of units, each a set of storages that the same op makes."""

    def __init__(
        self, step: StepGraph, region: Region, compiled: RegionProgram, rng_state_bytes: int
    ) -> None:
        self._step = step
        self._region = region
        self._compiled = compiled
        self._rng_state_bytes = rng_state_bytes
        self._tried: dict[KeptSet, _Candidate] = {}
        sizes = [step.storages[s].size_bytes for s in compiled.storages]
        self.units = _few(_units(compiled.program), sizes)

    def useful(self) -> list[_Candidate]:
        """What was tried and frees something."""
        self._shrink()
        self._subsets()
        return self.grown()

    def grown(self) -> list[_Candidate]:
        """The same, of what is found by starting from nothing."""
        self._grow()
        most = self.try_keeping(self.units).stored_bytes
        return [c for c in self._tried.values() if c.stored_bytes < most and c.seconds > 0]

    def try_keeping(self, units: Collection[KeptSet]) -> _Candidate:
        kept = self._compiled.program.kept(frozenset().union(*units))
        if kept not in self._tried:
            effect = selective(
                self._step, self._region, self._compiled, kept, self._rng_state_bytes
            )
            self._tried[kept] = self._measured(kept, effect)
        return self._tried[kept]

    def _measured(self, kept: KeptSet, effect: Effect) -> _Candidate:
        region, storages = self._region, self._step.storages
        start = region.backward_start
        alive = np.zeros(max(1, region.backward_stop - start), dtype=np.int64)
        stored = sum(size for size, _, _ in effect.extra)
        for storage, until in effect.holds.items():
            if until > region.stop and not storages[storage].kind.resident:
                stored += storages[storage].size_bytes
                alive[: max(0, until - start)] += storages[storage].size_bytes
        most = 0
        for recomputation in effect.recomputations:
            at = recomputation.at - start
            changes = np.zeros(len(recomputation.ops) + 1, dtype=np.int64)
            for copy in recomputation.copies:
                changes[copy.first] += copy.size_bytes
                changes[len(recomputation.ops) if copy.until else copy.last] -= copy.size_bytes
                if copy.until:
                    alive[at : max(at, copy.until - start)] += copy.size_bytes
            most = max(most, int(alive[at]) + int(np.cumsum(changes).max()))
        return _Candidate(kept, stored, max(most, int(alive.max())), effect.seconds(self._step))

    def _shrink(self) -> None:
        """From everything to nothing, dropping what costs the fewest seconds a byte."""
        kept = list(self.units)

        def price(unit: KeptSet) -> float:
            smaller = self.try_keeping([u for u in kept if u is not unit])
            return _price(smaller, self.try_keeping(kept))

        for unit in _cheapest_first(self.units, price):
            kept.remove(unit)
        self.try_keeping(kept)

    def _grow(self) -> None:
        """From nothing to everything, keeping what saves the most seconds a byte."""
        kept: list[KeptSet] = []

        def price(unit: KeptSet) -> float:
            return -_price(self.try_keeping(kept), self.try_keeping([*kept, unit]))

        for unit in _cheapest_first(self.units, price):
            kept.append(unit)
        self.try_keeping(kept)

    def _subsets(self) -> None:
        everything = self.try_keeping(self.units)
        worth = {
            unit: _price(self.try_keeping([u for u in self.units if u is not unit]), everything)
            for unit in self.units
        }
        valuable = sorted(self.units, key=lambda unit: -worth[unit])[:_SUBSETS_OF]
        for count in range(len(valuable) + 1):
            for units in combinations(valuable, count):
                self.try_keeping(units)


def _cheapest_first(
    units: Sequence[KeptSet], price: Callable[[KeptSet], float]
) -> Iterator[KeptSet]:
    """Takes the cheapest unit at each turn; its price is asked again only when it is up.

    Prices mostly rise as units are taken (Minoux, "Accelerated greedy algorithms", 1978).
    """
    heap = [(price(unit), number) for number, unit in enumerate(units)]
    heapify(heap)
    while heap:
        _, number = heappop(heap)
        now = price(units[number])
        if heap and now > heap[0][0]:
            heappush(heap, (now, number))
        else:
            yield units[number]


def _price(smaller: _Candidate, larger: _Candidate) -> float:
    """Seconds for each byte that the smaller set frees."""
    freed = larger.stored_bytes - smaller.stored_bytes
    return (smaller.seconds - larger.seconds) / max(1, freed)


def _units(program: Program) -> tuple[KeptSet, ...]:
    """Saved storages that can only be made together: results of one op."""
    units: list[set[int]] = []
    for storage in program.droppable:
        makers = set(program.makers[storage])
        together = next((u for u in units if any(makers & set(program.makers[s]) for s in u)), None)
        if together is None:
            units.append({storage})
        else:
            together.add(storage)
    return tuple(frozenset(u) for u in units)


def _few(units: Sequence[KeptSet], sizes: Sequence[int]) -> tuple[KeptSet, ...]:
    """The units, small neighbours taken together where there are too many to be tried alone."""
    found = list(units)
    bytes_of = [sum(sizes[s] for s in unit) for unit in found]
    while len(found) > _MOST_UNITS:
        pairs = [a + b for a, b in pairwise(bytes_of)]
        first = pairs.index(min(pairs))
        found[first : first + 2] = [found[first] | found[first + 1]]
        bytes_of[first : first + 2] = [pairs[first]]
    return tuple(found)


def _pareto(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Those that no other beats everywhere."""
    ordered = sorted(candidates, key=lambda c: (c.seconds, c.stored_bytes, c.backward_bytes))
    best: list[_Candidate] = []
    for c in ordered:
        if not any(
            b.stored_bytes <= c.stored_bytes and b.backward_bytes <= c.backward_bytes for b in best
        ):
            best.append(c)
    return best


def _thinned(candidates: Sequence[_Candidate], limit: int) -> list[_Candidate]:
    if len(candidates) <= limit:
        return list(candidates)
    peaks = np.quantile([c.backward_bytes for c in candidates], np.linspace(0, 1, _CEILINGS))
    hulls = [_hull([c for c in candidates if c.backward_bytes <= peak]) for peak in peaks.tolist()]
    wanted = [*_supported(candidates), *chain.from_iterable(reversed(hulls))]
    chosen = {c.kept: c for c in dict.fromkeys(wanted)}
    first = list(chosen.values())[:limit]
    rest = sorted((c for c in candidates if c.kept not in chosen), key=lambda c: c.stored_bytes)
    room = limit - len(first)
    picked = {round(i) for i in np.linspace(0, len(rest) - 1, min(room, len(rest)))}
    return [*first, *(rest[i] for i in sorted(picked))]


def _supported(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Those that are best at some price of a stored byte and of a byte in the backward.

    The most often best come first. With many regions a mix of these is all that is needed.
    """
    rows = np.array([(c.seconds, c.stored_bytes, c.backward_bytes) for c in candidates])
    rows = rows / np.maximum(np.ptp(rows, axis=0), 1e-30)
    stored, backward = np.meshgrid(np.geomspace(0.01, 100, 60), [0, *np.geomspace(0.01, 10, 20)])
    weights = np.stack([np.ones(stored.size), stored.ravel(), backward.ravel()])
    best = Counter((rows @ weights).argmin(axis=0).tolist())
    return [candidates[i] for i, _ in best.most_common()]


def _hull(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Lower convex hull of seconds over stored bytes (Andrew's monotone chain, 1979)."""
    hull: list[_Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.stored_bytes, c.seconds)):
        while len(hull) > 1 and not _turns_up(hull[-2], hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def _turns_up(a: _Candidate, b: _Candidate, c: _Candidate) -> bool:
    rise = (b.stored_bytes - a.stored_bytes) * (c.seconds - a.seconds)
    return rise > (c.stored_bytes - a.stored_bytes) * (b.seconds - a.seconds)
