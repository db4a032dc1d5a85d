"""The parts of which a choice is put together from the front: single regions and segments.

A tile is one region with an option, or a segment. A moment is looked at by the tile that covers its
place, where all that it counts is known, in bytes above what is stored before the tile. Where that
cannot be, or would be slow, bytes are taken at their worst: of more than ``MOST_SHARED`` shared
tensors, and of moments that look from a region at more or less than what is stored before it. Then
what fits by the tiles does fit, but not the other way round. Depends on the records alone.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from memfit.solvers.problem import Problem, Segment, SharedTensor

MOST_SHARED = 4
_NOTHING = -(10**40)
"""What is needed where no moment looks."""

Held = frozenset[int]
"""Shared tensors that are held."""


@dataclass(frozen=True, slots=True)
class Row:
    """A moment within a tile."""

    above_bytes: int
    """What is alive there beside what is stored before the tile."""
    tensors: Held
    """Shared tensors that are alive there if regions before the tile hold them."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One region with an option, or a segment."""

    first: int
    choices: tuple[int, ...]
    stored_bytes: int
    seconds: float
    rows: tuple[Row, ...]
    holds: frozenset[int]
    """Shared tensors that its options hold."""

    @property
    def stop(self) -> int:
        return self.first + len(self.choices)


@dataclass(frozen=True, slots=True)
class Step:
    """A tile where some shared tensors are held."""

    tile: Tile
    needed_bytes: int
    """The most that it takes above what is stored before it."""
    after: Held
    """Shared tensors that are held after it, of those that still count."""

    @property
    def order(self) -> tuple[float, int, int]:
        """None beats one that comes before it."""
        return self.tile.seconds, self.tile.stored_bytes, self.needed_bytes

    def beats(self, other: "Step") -> bool:
        """Whether it leads to the same place with no more of anything but seconds."""
        return (
            self.tile.stop == other.tile.stop
            and self.after == other.after
            and self.tile.stored_bytes <= other.tile.stored_bytes
            and self.needed_bytes <= other.needed_bytes
        )


def unbeaten(steps: Iterable[Step]) -> list[Step]:
    """The steps that no other one beats."""
    best: list[Step] = []
    for step in sorted(steps, key=lambda step: step.order):
        if not any(other.beats(step) for other in best):
            best.append(step)
    return best


class Tiling:
    """The tiles of a problem. The last place, after all regions, has one of no regions."""

    def __init__(self, problem: Problem) -> None:
        self.is_exact = _most_held(problem) <= MOST_SHARED
        """Whether nothing was taken at its worst."""
        self.problem = problem = problem if self.is_exact else _with_few_shared(problem)
        self._sizes = [tensor.size_bytes for tensor in problem.shared]
        self._held: dict[tuple[int, int], set[int]] = defaultdict(set)
        for number, tensor in enumerate(problem.shared):
            for holder in tensor.holders:
                self._held[holder].add(number)
        self._tensors: list[set[int]] = [set() for _ in problem.moments]
        for number, tensor in enumerate(problem.shared):
            for index in tensor.moments:
                self._tensors[index].add(number)
        self._known: dict[tuple[int, Held], list[Step]] = {}
        self._places = self._find_places()
        self._tiles = self._find_tiles()

    def steps(self, place: int, held: Held) -> list[Step]:
        """The tiles that begin at a place."""
        if (place, held) not in self._known:
            self._known[place, held] = [
                Step(tile, self._needed(tile, held), (held | tile.holds) & self._later[tile.stop])
                for tile in self._tiles[place]
            ]
        return self._known[place, held]

    def _needed(self, tile: Tile, held: Held) -> int:
        needs = (
            row.above_bytes + sum(self._sizes[t] for t in row.tensors & held) for row in tile.rows
        )
        return max(needs, default=_NOTHING)

    def _find_places(self) -> list[list[int]]:
        places: list[list[int]] = [[] for _ in range(len(self.problem.regions) + 1)]
        for index, moment in enumerate(self.problem.moments):
            places[moment.place].append(index)
            self.is_exact &= moment.region in (None, moment.stored)
        return places

    @cached_property
    def _later(self) -> list[frozenset[int]]:
        """For each place the shared tensors that moments there or later count."""
        later: list[frozenset[int]] = [frozenset()]
        for place in reversed(self._places):
            here = frozenset(t for index in place for t in self._tensors[index])
            later.append(later[-1] | here)
        return later[:0:-1]

    def least(self, price: float) -> tuple[float, int]:
        """The least that all tiles take in seconds and ``price`` for each stored byte, whatever
        they need, and the bytes that they then store."""
        rest = [(0.0, 0)]
        for tiles in reversed(self._tiles[:-1]):
            least = (math.inf, 0)
            for tile in tiles:
                value, stored_bytes = rest[-len(tile.choices)]
                value += tile.seconds + price * tile.stored_bytes
                if value < least[0]:
                    least = (value, stored_bytes + tile.stored_bytes)
            rest.append(least)
        return rest[-1]

    def rest(self, price: float) -> dict[tuple[int, Held], float]:
        """The least that follows a place where some shared tensors are held, in seconds and
        ``price`` for each stored byte and each that is needed at the end."""
        cheapest: list[dict[tuple[int, Held], float]] = []
        for tiles in self._tiles[:-1]:
            own: dict[tuple[int, Held], float] = {}
            for tile in tiles:
                key, value = (tile.stop, tile.holds), tile.seconds + price * tile.stored_bytes
                own[key] = min(value, own.get(key, math.inf))
            cheapest.append(own)
        reached: list[set[Held]] = [set() for _ in self._tiles]
        reached[0].add(frozenset())
        for place, own in enumerate(cheapest):
            for stop, holds in own:
                reached[stop] |= {(held | holds) & self._later[stop] for held in reached[place]}
        count = len(cheapest)
        rest = {(count, held): price * self.needed_at_end(held) for held in reached[-1]}
        for place in reversed(range(count)):
            for held in reached[place]:
                rest[place, held] = min(
                    (
                        value + rest[stop, (held | holds) & self._later[stop]]
                        for (stop, holds), value in cheapest[place].items()
                    ),
                    default=math.inf,
                )
        return rest

    def needed_at_end(self, held: Held) -> int:
        """The least that any choice takes in the end above all that it stores, where some shared
        tensors are held."""
        count = len(self.problem.regions)
        last = (t for tiles in self._tiles for t in tiles if t.stop == count and t.choices)
        of_last = (self._needed(tile, held) - tile.stored_bytes for tile in last)
        return max(self._needed(self._tiles[count][0], held), min(of_last, default=_NOTHING))

    def _find_tiles(self) -> list[list[Tile]]:
        tiles: list[list[Tile]] = [[] for _ in self.problem.regions]
        for r, region in enumerate(self.problem.regions):
            for o, option in enumerate(region.options):
                if not option.chained:
                    tiles[r].append(
                        self._tile(r, (o,), option.recompute_seconds, {}, self._places[r])
                    )
        for segment in self.problem.segments:
            tiles[segment.first].append(self._segment(segment))
        count = len(self.problem.regions)
        # What is looked at when all regions are chosen.
        return [*tiles, [self._tile(count, (), 0.0, {}, self._places[count])]]

    def _segment(self, segment: Segment) -> Tile:
        inside = [i for place in self._places[segment.first : segment.stop] for i in place]
        seconds = segment.recompute_seconds + sum(
            self.problem.regions[r].options[o].recompute_seconds
            for r, o in enumerate(segment.choices, segment.first)
        )
        return self._tile(segment.first, segment.choices, seconds, dict(segment.held), inside)

    def _tile(
        self,
        first: int,
        choices: tuple[int, ...],
        seconds: float,
        held: dict[int, int],
        moments: Sequence[int],
    ) -> Tile:
        regions = self.problem.regions
        options = [regions[r].options[o] for r, o in enumerate(choices, first)]
        stored = [0]
        for option in options:
            stored.append(stored[-1] + option.stored_bytes)
        rows = tuple(
            self._row(index, first, choices, stored, held.get(index, 0)) for index in moments
        )
        holds = frozenset(t for own in self._holds(first, choices) for t in own)
        return Tile(first, choices, stored[-1], seconds, rows, holds)

    def _row(
        self, index: int, first: int, choices: tuple[int, ...], stored: list[int], held: int
    ) -> Row:
        """A moment at a place within the tile."""
        moment = self.problem.moments[index]
        total = moment.base_bytes + stored[max(0, moment.stored - first)] + held
        inside = [r for r in range(first, first + len(choices)) if r < moment.stored]
        if moment.region is not None:
            region = self.problem.regions[moment.region]
            options = region.options
            if moment.region >= first:
                options = (options[choices[moment.region - first]],)
                inside.append(moment.region)
            # Of a region before the tile it is not known what it runs.
            total += max(option.work_bytes(moment.phase) for option in options)
        own = list(self._holds(first, choices))
        alive = {t for r in inside for t in own[r - first]} & self._tensors[index]
        total += sum(self._sizes[t] for t in alive)
        return Row(total, frozenset(self._tensors[index] - alive))

    def _holds(self, first: int, choices: tuple[int, ...]) -> Iterator[set[int]]:
        return (self._held[r, o] for r, o in enumerate(choices, first))


def _most_held(problem: Problem) -> int:
    """The most shared tensors that may be held between two regions and still count."""
    spans = [
        (min(r for r, _ in tensor.holders), max(problem.moments[i].place for i in tensor.moments))
        for tensor in problem.shared
        if tensor.holders and tensor.moments
    ]
    places = range(len(problem.regions) + 1)
    return max(sum(first < place <= last for first, last in spans) for place in places)


def _with_few_shared(problem: Problem) -> Problem:
    """The problem with few shared tensors: what one region holds alone is stored by it, and of the
    others all but the largest are always there."""
    alone = [t for t in problem.shared if len({r for r, _ in t.holders}) == 1]
    others = sorted((t for t in problem.shared if t not in alone), key=lambda t: -t.size_bytes)
    bases = [moment.base_bytes for moment in problem.moments]
    for tensor in others[MOST_SHARED:]:
        for index in set(tensor.moments):
            bases[index] += tensor.size_bytes
    regions = [[*region.options] for region in problem.regions]
    for tensor in alone:
        at_work = {problem.moments[i].phase for i in tensor.moments if _is_own(problem, tensor, i)}
        for r, o in set(tensor.holders):
            option, size = regions[r][o], tensor.size_bytes
            regions[r][o] = replace(
                option,
                stored_bytes=option.stored_bytes + size,
                forward_bytes=option.forward_bytes + size * ("forward" in at_work),
                backward_bytes=option.backward_bytes + size * ("backward" in at_work),
            )
    return replace(
        problem,
        regions=tuple(
            replace(region, options=tuple(own), kind=r)
            for r, (region, own) in enumerate(zip(problem.regions, regions, strict=True))
        ),
        moments=tuple(
            replace(moment, base_bytes=base)
            for moment, base in zip(problem.moments, bases, strict=True)
        ),
        shared=tuple(others[:MOST_SHARED]),
    )


def _is_own(problem: Problem, tensor: SharedTensor, index: int) -> bool:
    return problem.moments[index].region == tensor.holders[0][0]
