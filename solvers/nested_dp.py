"""Nested dynamic programming: the regions tiled by single regions and by segments, from the front.

What lies before a tile (see :mod:`memfit.solvers.tiles`) matters to it only by the bytes that are
stored there and by the shared tensors that are held there, so that the program is

    W[r, H]      the best (stored bytes, value) of all tilings of the regions before r that hold H

and a tile that stores s and needs n above what is stored before it leads from r to its end:

    fastest      (stored + s, seconds + those of the tile)            if stored + n <= budget
    lowest       (stored + s, max(peak, stored + n))

Only states that no other beats in both numbers are kept. Lagrange's relaxation says which of them
lead nowhere: with a price for each stored byte, what follows a state takes no less than the least
that all later tiles take in seconds and bytes, each by itself, less the price of the bytes that are
left of the budget. A first walk keeps few states, those nearest to that bound, and finds a choice;
a second one keeps all that may yet lead to a better one, which proves what it finds. Few are left,
as identical regions make the same sums in any order.

Where they are more than ``MOST_IN_ALL`` after all, or the peak is lowered, ``MOST_STATES`` are kept
for each H. Where there are more, neighbours in bytes are thinned to one of them; another walk
merges them into one that is as good as all, which bounds what was lost. It needs no integer
program. Segments are those of rotor (Beaumont et al., "Optimal checkpointing for heterogeneous
chains", 2019) of depth two, with options for each region. Depends on the tiles.
"""

import math
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from heapq import nsmallest
from operator import itemgetter
from typing import Any, Protocol

from memfit.solvers.ordering import in_order
from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Problem,
    Solution,
    Status,
    describe,
    peak_bytes,
    recompute_seconds,
    seconds_ceiling,
)
from memfit.solvers.tiles import Held, Step, Tile, Tiling, unbeaten

NAME = "nested_dp"
FEW_STATES, MOST_STATES = 100, 300
"""Of one place and one set of shared tensors, in a walk that thins them."""
FEW_IN_ALL, MOST_IN_ALL = 20_000, 1_500_000
"""States of a walk before it begins to thin them, and before one that may not is given up."""
ABOVE = tuple(0.001 * 1.25**i for i in range(31))
"""Shares of the bound above it at which a choice is looked for."""
LOWEST_PRICE, HIGHEST_PRICE, PRICE_STEPS = 1e-18, 1e9, 25
"""Seconds for a stored byte that are tried, and halvings of what is between two of them."""
PEAK_SHARE = 0.1
"""Share of the time limit that may go into a lower peak at the same seconds."""


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Fewest seconds within the budget; at the same seconds, lowest peak."""
    started = time.perf_counter()
    program = _Program(problem)
    found, bound = program.fastest(limits)
    if found is None:
        took = time.perf_counter() - started
        return Solution((), Status.INFEASIBLE, 0.0, 0, NAME, solve_seconds=took)
    if bound is None:
        bound = program.least_seconds(recompute_seconds(problem, found))
    return _solution(problem, limits, program, found, bound, started)


def prove(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution | None:
    """The same where that is proved soon; None where it is not, or where nothing is found."""
    started = time.perf_counter()
    program = _Program(problem)
    if not program.is_exact:
        return None
    found, bound = program.fastest(limits)
    if found is None or bound is None:
        return None
    return _solution(problem, limits, program, found, bound, started)


def _solution(
    problem: Problem,
    limits: Limits,
    program: "_Program",
    choices: tuple[int, ...],
    bound: float,
    started: float,
) -> Solution:
    if limits.lowest_peak:
        until = time.perf_counter() + limits.seconds * PEAK_SHARE
        choices = _lowered(problem, program, choices, until)
    if not problem.segments:
        choices = in_order(problem, choices)
    seconds = recompute_seconds(problem, choices)
    is_proved = seconds <= seconds_ceiling(bound) + _allowed(limits, seconds)
    status = Status.OPTIMAL if is_proved else Status.FEASIBLE
    took = time.perf_counter() - started
    return describe(problem, choices, status, NAME, bound_seconds=bound, solve_seconds=took)


def _allowed(limits: Limits, seconds: float) -> float:
    """Seconds that a choice may be above the bound."""
    return max(limits.gap_seconds, limits.gap * seconds)


def minimise_peak(
    problem: Problem, limits: Limits = DEFAULT_LIMITS, *, any_seconds: bool = False
) -> Solution:
    """Lowest peak of all choices, whatever the budget; at the same peak, fewest seconds.

    With ``any_seconds`` the first choice of that peak will do, which takes a fraction of the time.
    """
    started = time.perf_counter()
    lowest = _Program(problem).lowest()
    if lowest is None:
        return Solution((), Status.INFEASIBLE, 0.0, 0, NAME)
    at_peak = replace(problem, budget_bytes=peak_bytes(problem, lowest))
    solution = None if any_seconds else solve(at_peak, limits)
    if solution is None or not solution.choices:  # what fits is judged by bytes at their worst
        solution = describe(at_peak, lowest, Status.FEASIBLE, NAME)
    return replace(solution, solve_seconds=time.perf_counter() - started)


def _lowered(
    problem: Problem, program: "_Program", choices: tuple[int, ...], until: float
) -> tuple[int, ...]:
    """The choice of lowest peak at the same seconds, by steps that double and halve."""
    ceiling, step = seconds_ceiling(recompute_seconds(problem, choices)), 1
    while step and time.perf_counter() < until:
        lower = program.within(peak_bytes(problem, choices) - step, ceiling)
        if lower is None or recompute_seconds(problem, lower) > ceiling:
            step //= 2
        else:
            choices, step = lower, 2 * step
    return choices


_State = tuple[int, float, Tile | None, Any]
"""A tiling of the regions so far: bytes stored; seconds or peak; the last tile and the state before
it. A plain tuple, because of the time that it takes to make a million."""


def _choices(state: _State) -> tuple[int, ...]:
    """An option for each region."""
    parts = []
    while (tile := state[2]) is not None:
        parts.append(tile.choices)
        state = state[3]
    return tuple(choice for part in reversed(parts) for choice in part)


Reached = tuple[Step, list[_State]]
"""A step, and what it leads to."""


class _Walk(Protocol):
    """What is looked for."""

    def from_(self, place: int, held: Held, states: list[_State]) -> Iterator[Reached]:
        """The states that those of a place lead to."""


Rest = dict[tuple[int, Held], float]
"""See :meth:`Tiling.rest`."""


@dataclass(frozen=True, slots=True)
class _Fastest:
    """Fewest seconds within a budget, of what takes no more than a ceiling.

    With a price for each byte, what follows a state takes at least what it takes in seconds and
    bytes (``rest``), less the price of the bytes that are left of the budget.
    """

    tiling: Tiling
    budget: int
    ceiling: float
    price: float
    rest: Rest

    def priced(self, state: _State) -> float:
        return state[1] + self.price * state[0]

    def from_(self, place: int, held: Held, states: list[_State]) -> Iterator[Reached]:
        states = sorted(states, key=self.priced)
        priced = [self.priced(state) for state in states]
        steps = self.tiling.steps(place, held)
        for step in unbeaten(step for step in steps if priced[0] <= self._most(step)):
            tile, room = step.tile, self.budget - step.needed_bytes
            stored_bytes, seconds = tile.stored_bytes, tile.seconds
            latest = self.ceiling - seconds
            yield (
                step,
                [
                    (state[0] + stored_bytes, state[1] + seconds, tile, state)
                    for state in states[: bisect_right(priced, self._most(step))]
                    if state[0] <= room and state[1] <= latest
                ],
            )

    def _most(self, step: Step) -> float:
        """The most seconds and bytes before a step for what follows to stay below the ceiling."""
        tile = step.tile
        own = tile.seconds + self.price * tile.stored_bytes
        return self.ceiling + self.price * self.budget - self.rest[tile.stop, step.after] - own


@dataclass(frozen=True, slots=True)
class _Lowest:
    """Lowest peak."""

    tiling: Tiling

    def from_(self, place: int, held: Held, states: list[_State]) -> Iterator[Reached]:
        for step in unbeaten(self.tiling.steps(place, held)):
            tile, needed_bytes = step.tile, step.needed_bytes
            yield (
                step,
                [
                    (s[0] + tile.stored_bytes, max(s[1], s[0] + needed_bytes), tile, s)
                    for s in states
                ],
            )


class _TooMany(Exception):
    """More states than a walk may have."""


class _Program:
    """The walks over the tiles of a problem."""

    def __init__(self, problem: Problem) -> None:
        self._tiling = Tiling(problem)
        self._count = len(problem.regions)
        self._budget = problem.budget_bytes
        self._price = self._best_price()
        self._rest = self._tiling.rest(self._price)

    @property
    def is_exact(self) -> bool:
        """Whether what does not fit by the tiles does not fit."""
        return self._tiling.is_exact

    def fastest(self, limits: Limits) -> tuple[tuple[int, ...] | None, float | None]:
        """The fastest choice that is found, and the seconds that none goes below if it is known.

        First comes a walk of few states, of what takes little longer than the bound, or a little
        longer than that; then one of all states, of what takes no longer than what was found.
        """
        found = self._find()
        if found is None:
            return None, None
        best, ceiling = _choices(found), found[1]
        if not self.is_exact:
            return best, None
        # As good as free is not free: a budget that fits all must recompute nothing.
        aim = ceiling - (_allowed(limits, ceiling) if ceiling > limits.gap_seconds else 0.0)
        try:
            end = self._walk(self._within(self._budget, aim), list, MOST_IN_ALL)
        except _TooMany:
            return best, None
        return (best, aim) if end is None else (_choices(end), end[1])

    def _find(self) -> _State | None:
        """A choice near the bound."""
        bound = max(0.0, self._rest[0, frozenset()] - self._price * self._budget)
        ceilings = [*(bound * (1 + above) for above in ABOVE), math.inf]
        return next(filter(None, map(self._few, ceilings)), None)

    def _few(self, ceiling: float) -> _State | None:
        """The end of a walk of few states, or None."""
        walk = self._within(self._budget, ceiling)
        return self._walk(walk, _Nearest(walk.priced))

    def within(self, budget: int, ceiling: float) -> tuple[int, ...] | None:
        """Fewest seconds of what fits; None if that takes more than ``ceiling``."""
        try:
            end = self._walk(self._within(budget, ceiling), list, MOST_IN_ALL)
        except _TooMany:
            end = self._walk(self._within(budget, ceiling), _thinned)
        return None if end is None else _choices(end)

    def least_seconds(self, ceiling: float) -> float:
        """Seconds that no choice within the budget goes below."""
        if not self.is_exact:
            return 0.0
        end = self._walk(self._within(self._budget, ceiling), _merged)
        return ceiling if end is None else end[1]

    def lowest(self) -> tuple[int, ...] | None:
        """Lowest peak."""
        end = self._walk(_Lowest(self._tiling), _thinned)
        return None if end is None else _choices(end)

    def _within(self, budget: int, ceiling: float) -> _Fastest:
        return _Fastest(self._tiling, budget, seconds_ceiling(ceiling), self._price, self._rest)

    def _best_price(self) -> float:
        """About the price of a byte by which the bound is highest."""
        tensors = frozenset(range(len(self._tiling.problem.shared)))
        room = self._budget - self._tiling.needed_at_end(tensors)
        low, high = 0.0, LOWEST_PRICE
        if self._tiling.least(low)[1] <= room:
            return 0.0
        while self._tiling.least(high)[1] > room:
            low, high = high, 4 * high
            if high > HIGHEST_PRICE:
                return 0.0
        for _ in range(PRICE_STEPS):
            price = (low + high) / 2
            if self._tiling.least(price)[1] > room:
                low = price
            else:
                high = price
        return high

    def _walk(
        self,
        walk: _Walk,
        thin: Callable[[list[_State]], list[_State]],
        most: float = math.inf,
    ) -> _State | None:
        """The best state at the end, or None; :class:`_TooMany` of more than ``most`` in all."""
        places = range(self._count + 1)
        reached: list[dict[Held, list[_State]]] = [defaultdict(list) for _ in places]
        reached[0][frozenset()].append((0, 0.0, None, None))
        ends: list[_State] = []
        for place in places:
            for held, states in reached[place].items():
                if not states:
                    continue
                for step, led in walk.from_(place, held, thin(_undominated(states))):
                    there = reached[step.tile.stop][step.after] if place < self._count else ends
                    there += led
                    most -= len(led)
                    if most < 0:
                        raise _TooMany
            reached[place].clear()
        return min(ends, key=_value, default=None)


class _Nearest:
    """Keeps all states as long as they are few, and then those nearest to the bound."""

    def __init__(self, priced: Callable[[_State], float]) -> None:
        self._priced = priced
        self._left = FEW_IN_ALL

    def __call__(self, states: list[_State]) -> list[_State]:
        if len(states) <= max(FEW_STATES, self._left):
            self._left -= len(states)
            return states
        # The one of fewest bytes leads to the end if any does.
        return [states[0], *nsmallest(FEW_STATES, states[1:], key=self._priced)]


_value = itemgetter(1)
_both = itemgetter(0, 1)


def _undominated(states: list[_State]) -> list[_State]:
    """Those that no other beats in both numbers, by rising bytes."""
    states.sort(key=_both)
    best: list[_State] = []
    least = math.inf
    for state in states:
        if state[1] < least or not best:
            best.append(state)
            least = state[1]
    return best


def _thinned(states: list[_State]) -> list[_State]:
    """A number of states that is quick, the one of fewest bytes among them."""
    return [bucket[-1] if i else bucket[0] for i, bucket in enumerate(_buckets(states))]


def _merged(states: list[_State]) -> list[_State]:
    """As many states, each as good in both numbers as any that it stands for."""
    return [(bucket[0][0], *bucket[-1][1:]) for bucket in _buckets(states)]


def _buckets(states: list[_State]) -> list[list[_State]]:
    """Neighbours in bytes together, the ones of fewest bytes alone."""
    if len(states) <= MOST_STATES:
        return [[state] for state in states]
    low, high = states[0][0], states[-1][0]
    buckets: dict[int, list[_State]] = defaultdict(list)
    for state in states[1:]:
        number = (state[0] - low) * (MOST_STATES - 2) // max(1, high - low)
        buckets[number].append(state)
    return [states[:1], *buckets.values()]
