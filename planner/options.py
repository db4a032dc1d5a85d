"""Turns the captured step into the solver's problem: options for each region, a row for each
moment.

A region's own forward and backward are moments, and so is each stretch of the step between them.
The bytes of a storage go to the base of a moment when it is alive whatever is chosen, to an option
when one region decides about it, and to a shared tensor when several do. Depends on the step's
records, on ``recompute`` for what an option does, and on the solver's records.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from memfit.planner.moving import Move
from memfit.planner.recompute import Effect, Recomputation
from memfit.planner.regions import Region
from memfit.planner.simulate import Integers, certain_until, round_up
from memfit.planner.step_graph import Phase, StepGraph
from memfit.solvers import problem as solver


@dataclass(frozen=True, slots=True)
class RegionOption:
    """One way to run a region: its name in the plan, what it does, what it costs."""

    action: str
    source: Effect
    """What it does to the region that it was worked out for."""
    recompute_seconds: float
    keep: tuple[str, ...] = ()
    """Names of the tensors that ``selective`` keeps, and of those that it drops."""
    recompute: tuple[str, ...] = ()
    lean: bool = True
    """Offered whatever the ops cost; the smallest budget that has a plan is made of these."""
    recompute_input: tuple[str, ...] = ()
    """Names of the inputs that the region before makes again, by their names there."""
    lead: str = ""
    """The module that makes them, where it is no region of its own."""
    move: Move | None = None
    """The way from there, if it is another region."""

    @property
    def effect(self) -> Effect:
        """What it does to its region."""
        return self.move.effect(self.source) if self.move else self.source

    @property
    def holds(self) -> dict[int, int]:
        """Storages that it keeps alive, with the clock until which it does."""
        return self.move.holds(self.source) if self.move else self.source.holds


@dataclass(frozen=True, slots=True)
class SegmentOption:
    """A segment: an option for each of its regions, and what runs again to make their inputs."""

    first: int
    choices: tuple[int, ...]
    rerun: Recomputation
    """Before the first need of the last region's backward."""
    seconds: tuple[float, ...]
    """For each region what it runs again for the next; 0 for the last."""

    @property
    def last(self) -> int:
        """The region whose backward comes first."""
        return self.first + len(self.choices) - 1


@dataclass(frozen=True, slots=True)
class _Window:
    """A stretch of the step's own ops, ``start`` to ``stop``, that becomes one moment."""

    start: int
    stop: int
    stored: int
    region: int | None
    phase: solver.Phase
    name: str


Options = Sequence[Sequence[RegionOption]]
# Bytes, and the clocks from and until which they are alive.
_Span = tuple[int, int, int]
_Holders = tuple[tuple[int, int], ...]


def build_problem(
    step: StepGraph,
    regions: Sequence[Region],
    options: Options,
    budget_bytes: int,
    allocation_bytes: int = 1,
    segments: Sequence[SegmentOption] = (),
) -> solver.Problem:
    """The problem whose rows say what the simulator will say, for any choice of the options.

    ``segments`` are those that it may choose, in place of single regions.
    """
    builder = _Builder(step, regions, options, allocation_bytes)
    windows = _windows(step, regions, builder.cuts())
    shared = builder.shared(windows)
    moments = tuple(
        solver.Moment(w.name, builder.base_bytes(w), w.stored, w.region, w.phase) for w in windows
    )
    by_region = {(w.region, w.phase): w for w in windows if w.region is not None}
    kinds: dict[object, int] = {}
    out = []
    for r, region in enumerate(regions):
        described = builder.described(r, by_region[r, "forward"], by_region[r, "backward"])
        kind = kinds.setdefault((region.kind, described), len(kinds))
        out.append(solver.Region(region.name, described, kind))
    offered = builder.segments(segments, windows, out)
    # What is held while others work is more than the solvers know of.
    within = (s for s in offered if all(s.first <= moments[i].place < s.stop for i, _ in s.held))
    return solver.Problem(tuple(out), moments, budget_bytes, shared, tuple(within))


class _Builder:
    """Splits the life of every storage into what is certain and what the options decide."""

    def __init__(
        self, step: StepGraph, regions: Sequence[Region], options: Options, allocation_bytes: int
    ) -> None:
        self._step = step
        self._regions = regions
        self._options = options
        self._round = allocation_bytes
        self._size = [round_up(s.size_bytes, allocation_bytes) for s in step.storages]
        self._certain = certain_until(step, regions)
        self._own: dict[tuple[int, int], list[_Span]] = defaultdict(list)
        self._common: dict[int, list[tuple[int, int, int]]] = {}
        self._split(self._find_deciders())
        self._alive, self._between = self._certain_bytes()
        self._numbers: dict[object, tuple[int, int, int]] = {}

    def _split(self, deciders: dict[int, list[tuple[int, int, int]]]) -> None:
        """A storage is a region's own if it alone decides, from the end of its forward on."""
        for storage, holders in deciders.items():
            certain = int(self._certain[storage])
            deciding = {r for r, _, _ in holders}
            if len(deciding) > 1 or certain > self._regions[holders[0][0]].stop:
                self._common[storage] = holders
                continue
            for r, o, clock in holders:
                self._own[r, o].append((self._size[storage], certain, clock))

    def _find_deciders(self) -> dict[int, list[tuple[int, int, int]]]:
        """For each storage, the (region, option, clock) that keep it longer than is certain."""
        holders: dict[int, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
        for r, options in enumerate(self._options):
            for o, option in enumerate(options):
                for storage, clock in option.holds.items():
                    if not self._step.storages[storage].kind.resident:
                        holders[storage][r][o] = clock
        deciders: dict[int, list[tuple[int, int, int]]] = {}
        for storage, by_region in holders.items():
            for r, by_option in by_region.items():
                if len(by_option) == len(self._options[r]):
                    certain = min(by_option.values())
                    self._certain[storage] = max(self._certain[storage], certain)
            rest = [
                (r, o, clock)
                for r, by_option in by_region.items()
                for o, clock in by_option.items()
                if clock > self._certain[storage]
            ]
            if rest:
                deciders[storage] = rest
        return deciders

    def _certain_bytes(self) -> tuple[Integers, Integers]:
        """Bytes alive whatever is chosen, resident ones included: during each op, with its
        workspace, and before it, when what the op before leaves is gone."""
        changes = np.zeros(len(self._step.ops) + 1, dtype=np.int64)
        made = np.zeros_like(changes)
        for storage, size, certain in zip(
            self._step.storages, self._size, self._certain.tolist(), strict=True
        ):
            born = max(0, storage.born)
            changes[born] += size
            if not storage.kind.resident:
                changes[certain] -= size
                made[born] += size if certain > born else 0
        workspace = np.array([op.workspace_bytes for op in self._step.ops], dtype=np.int64)
        alive = np.cumsum(changes)
        return alive[:-1] + workspace, alive - made

    def cuts(self) -> set[int]:
        """Clocks from which on options decide about a storage that was certain until then."""
        return {int(self._certain[storage]) for storage in self._common}

    def base_bytes(self, window: _Window) -> int:
        """What an option of the region at work adds to; the most alive where no region works."""
        if window.region is None:
            return int(self._alive[window.start : window.stop].max())
        return int(self._alive[window.start])

    def shared(self, windows: Sequence[_Window]) -> tuple[solver.SharedTensor, ...]:
        """Storages about which several regions decide, or one beside references of the step."""
        merged: dict[tuple[_Holders, tuple[int, ...]], int] = defaultdict(int)
        for storage, deciders in self._common.items():
            last = max(clock for _, _, clock in deciders)
            certain = int(self._certain[storage])
            moments = tuple(i for i, w in enumerate(windows) if w.stop > certain and w.start < last)
            merged[tuple((r, o) for r, o, _ in deciders), moments] += self._size[storage]
        return tuple(
            solver.SharedTensor(f"shared {i}", size, holders, moments)
            for i, ((holders, moments), size) in enumerate(merged.items())
        )

    def described(self, r: int, forward: _Window, backward: _Window) -> tuple[solver.Option, ...]:
        """The numbers of a region's options: stored bytes, the peaks of its forward and backward.

        They are the same where options do the same and as much is alive around them.
        """
        region, around = self._regions[r], (self._profile(forward), self._profile(backward))
        described = []
        for o, option in enumerate(self._options[r]):
            own = tuple((size, *map(region.place, life)) for size, *life in self._own[r, o])
            key = id(option.source), own, around
            if key not in self._numbers:
                self._numbers[key] = self._count(r, o, forward, backward)
            described.append(
                solver.Option(
                    option.action,
                    *self._numbers[key],
                    option.recompute_seconds,
                    option.keep,
                    bool(option.recompute_input) and not option.lead,
                )
            )
        return tuple(described)

    def _profile(self, window: _Window) -> object:
        """What is alive in a region's window and between its ops, above what is at its start."""
        assert window.region is not None
        region = self._regions[window.region]
        start, stop = window.start, window.stop
        if window.phase == "backward":
            start, stop = min(start, region.backward_start), max(stop, region.backward_stop)
        span = slice(start, stop)
        above = np.stack([self._alive[span], self._between[span]]) - self._alive[window.start]
        return window.start - start, window.stop - start, above.tobytes()

    def _count(self, r: int, o: int, forward: _Window, backward: _Window) -> tuple[int, int, int]:
        """Bytes that an option stores, and most that its forward and its backward hold."""
        region = self._regions[r]
        own = self._spans(r, o) + [
            (size, region.backward_start, until) for size, until in self._given(r, o)
        ]
        between = (region.stop, region.backward_start)
        stored = sum(
            size for size, start, stop in own if start <= between[0] and stop >= between[1]
        )
        recomputations = self._options[r][o].effect.recomputations
        return stored, self._most(own, forward, ()), self._most(own, backward, recomputations)

    def segments(
        self,
        segments: Sequence[SegmentOption],
        windows: Sequence[_Window],
        regions: Sequence[solver.Region],
    ) -> Iterator[solver.Segment]:
        """The segments as numbers, beside those of ``regions``."""
        starts = [window.start for window in windows]
        for segment in segments:
            last = regions[segment.last].options[segment.choices[-1]]
            held = self._held(segment, windows, starts, last.backward_bytes)
            seconds = sum(segment.seconds)
            yield solver.Segment(
                segment.first, segment.choices, seconds, tuple(sorted(held.items()))
            )

    def _held(
        self,
        segment: SegmentOption,
        windows: Sequence[_Window],
        starts: Sequence[int],
        alone: int,
    ) -> Counter[int]:
        """Bytes beside what the options hold, by window: the inputs that were made again and wait.

        ``alone`` are those of the last region's own backward.
        """
        last, at = segment.last, segment.rerun.at
        held: Counter[int] = Counter()
        for r, o in enumerate(segment.choices[1:], segment.first + 1):
            for size, until in self._given(r, o):
                for index in range(bisect_right(starts, at) - 1, bisect_left(starts, until)):
                    window = windows[index]
                    if (window.region, window.phase) != (r, "backward"):
                        held[index] += size
        index = bisect_right(starts, at) - 1
        window, own = windows[index], self._spans(last, segment.choices[-1])
        most = self._most(own, replace(window, stop=window.start + 1), (segment.rerun,))
        held[index] = max(held[index], most - alone)
        return held

    def _spans(self, r: int, o: int) -> list[_Span]:
        """What an option decides about alone, and what it allocates for itself."""
        extra = self._options[r][o].effect.extra
        return self._own[r, o] + [(round_up(size, self._round), a, b) for size, a, b in extra]

    def _given(self, r: int, o: int) -> list[tuple[int, int]]:
        """Bytes of the inputs that are made again for an option, and until when it holds them."""
        chain = self._options[r][o].effect.chain
        if chain is None:
            return []
        return [(self._size[storage], until) for storage, until in chain.given.items()]

    def _most(
        self,
        own: list[_Span],
        window: _Window,
        recomputations: Sequence[Recomputation],
    ) -> int:
        """Most bytes above the window's base, in its own ops or in a recomputation between them."""
        spans = list(own)
        most = 0
        for recomputation in recomputations:
            most = max(most, self._recomputation_bytes(spans, recomputation))
            spans += [
                (round_up(copy.size_bytes, self._round), recomputation.at, copy.until)
                for copy in recomputation.copies
                if copy.until > recomputation.at
            ]
        clocks = np.arange(window.start, window.stop)
        alive = self._alive[window.start : window.stop].astype(np.int64)
        for size, start, stop in spans:
            alive += size * ((clocks >= start) & (clocks < stop))
        return max(most, int(alive.max(initial=0))) - int(self._alive[window.start])

    def _recomputation_bytes(self, own: list[_Span], recomputation: Recomputation) -> int:
        """Most bytes alive while the ops run again, between the ops around ``recomputation.at``."""
        at, ops = recomputation.at, recomputation.ops
        before = int(self._between[at])
        before += sum(size for size, start, stop in own if start <= at < stop)
        changes = np.zeros(len(ops) + 1, dtype=np.int64)
        for copy in recomputation.copies:
            changes[copy.first] += round_up(copy.size_bytes, self._round)
            end = len(ops) if copy.until else copy.last
            changes[end] -= round_up(copy.size_bytes, self._round)
        workspace = np.array([self._step.ops[i].workspace_bytes for i in ops], dtype=np.int64)
        return before + int((np.cumsum(changes[:-1]) + workspace).max(initial=0))


def _windows(step: StepGraph, regions: Sequence[Region], cuts: Collection[int]) -> list[_Window]:
    """The step cut into the regions' forwards and backwards and what lies between, in order.

    What lies between is cut again at ``cuts``.
    """
    spans: list[tuple[int, int, int, solver.Phase]] = []
    for r, region in enumerate(regions):
        spans.append((region.start, region.stop, r, "forward"))
        spans.append((region.backward_start, region.backward_stop, r, "backward"))
    windows: list[_Window] = []
    clock = 0
    end = len(step.ops)
    for start, stop, r, phase in sorted(spans):
        start = max(start, clock)
        windows += _between(step, regions, clock, start, cuts)
        stored = r if phase == "forward" else _stored(regions, start, exclude=r)
        name = f"{phase} of {regions[r].name}"
        windows.append(_Window(start, max(start + 1, stop), stored, r, phase, name))
        clock = max(clock, stop)
    windows += _between(step, regions, clock, end, cuts)
    return windows


def _between(
    step: StepGraph, regions: Sequence[Region], start: int, stop: int, cuts: Collection[int]
) -> Iterator[_Window]:
    ends = sorted({start, stop, *(c for c in cuts if start < c < stop)})
    return (_outside(step, regions, a, b) for a, b in pairwise(ends))


def _outside(step: StepGraph, regions: Sequence[Region], start: int, stop: int) -> _Window:
    phase = step.ops[start].phase
    before = [r.name for r in regions if r.stop <= start]
    name = phase.value
    if phase is not Phase.OPTIMIZER and regions:
        name += f" after {before[-1]}" if before and phase is Phase.FORWARD else " outside regions"
    kind: solver.Phase = "forward" if phase is Phase.FORWARD else "backward"
    return _Window(start, stop, _stored(regions, start), None, kind, name)


def _stored(regions: Sequence[Region], clock: int, exclude: int | None = None) -> int:
    """How many regions, from the first, hold what they store at ``clock``."""
    holding = [
        r
        for r, region in enumerate(regions)
        if region.stop <= clock and region.backward_stop > clock and r != exclude
    ]
    return max(holding) + 1 if holding else 0
