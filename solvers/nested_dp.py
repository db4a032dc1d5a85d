"""Nested dynamic programming: the regions tiled by single regions and by segments, from the front.

What lies before a tile (see :mod:`memfit.solvers.tiles`) matters to it only by the bytes that are
stored there and by the shared tensors that are held there, so that the program is

    W[r, H]      the best (stored bytes, value) of all tilings of the regions before r that hold H

and a tile that stores s and needs n above what is stored before it leads from r to its end:

    fastest      (stored + s, seconds + those of the tile)            if stored + n <= budget
    lowest       (stored + s, max(peak, stored + n))

Only states that no other beats in both numbers are kept, at most ``MOST_STATES`` for each H. Where
there are more, neighbours in bytes are thinned to one of them; a second walk merges them into one
that is as good as all, which bounds what was lost. It needs no integer program. Segments are those
of rotor (Beaumont et al., "Optimal checkpointing for heterogeneous chains", 2019) of depth two,
with options for each region. Depends on the tiles.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

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
from memfit.solvers.tiles import Held, Step, Tile, Tiling

NAME = "nested_dp"
MOST_STATES = 300
PEAK_SHARE = 0.1
"""Share of the time limit that may go into a lower peak at the same seconds."""


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Fewest seconds within the budget; at the same seconds, lowest peak."""
    started = time.perf_counter()
    program = _Program(problem)
    found = program.fastest(problem.budget_bytes)
    if found is None:
        took = time.perf_counter() - started
        return Solution((), Status.INFEASIBLE, 0.0, 0, NAME, solve_seconds=took)
    bound = program.least_seconds(problem.budget_bytes)
    choices = _lowered(problem, program, found, time.perf_counter() + limits.seconds * PEAK_SHARE)
    seconds = recompute_seconds(problem, choices)
    is_proved = seconds <= seconds_ceiling(bound) + max(limits.gap_seconds, limits.gap * seconds)
    status = Status.OPTIMAL if is_proved else Status.FEASIBLE
    took = time.perf_counter() - started
    return describe(problem, choices, status, NAME, bound_seconds=bound, solve_seconds=took)


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
    """The choice of lowest peak at the same seconds, by bisection over the budget."""
    ceiling = seconds_ceiling(recompute_seconds(problem, choices))
    too_low = problem.unavoidable_bytes - 1
    while too_low + 1 < (peak := peak_bytes(problem, choices)) and time.perf_counter() < until:
        budget = (too_low + peak) // 2
        lower = program.fastest(budget, ceiling)
        if lower is not None and recompute_seconds(problem, lower) <= ceiling:
            choices = lower
        else:
            too_low = budget
    return choices


class _State(NamedTuple):
    """A tiling of the regions so far."""

    stored_bytes: int
    value: float
    """Seconds or peak."""
    tile: Tile | None = None
    before: "_State | None" = None

    def choices(self) -> tuple[int, ...]:
        """An option for each region."""
        parts = []
        state: _State | None = self
        while state is not None and state.tile is not None:
            parts.append(state.tile.choices)
            state = state.before
        return tuple(choice for part in reversed(parts) for choice in part)


class _Walk(Protocol):
    """What is looked for."""

    def value(self, state: _State, step: Step) -> float | None:
        """The value after a step; None if it leads nowhere."""


@dataclass(frozen=True, slots=True)
class _Fastest:
    """Fewest seconds within a budget."""

    budget: int
    ceiling: float
    rest: list[float]
    """For each place the fewest seconds of what follows, whatever it needs."""

    def value(self, state: _State, step: Step) -> float | None:
        seconds = state.value + step.tile.seconds
        fits = state.stored_bytes + step.needed_bytes <= self.budget
        return seconds if fits and seconds + self.rest[step.tile.stop] <= self.ceiling else None


@dataclass(frozen=True, slots=True)
class _Lowest:
    """Lowest peak."""

    def value(self, state: _State, step: Step) -> float | None:
        return max(state.value, state.stored_bytes + step.needed_bytes)


class _Program:
    """The walks over the tiles of a problem."""

    def __init__(self, problem: Problem) -> None:
        self._tiling = Tiling(problem)
        self._count = len(problem.regions)

    def fastest(self, budget: int, ceiling: float = math.inf) -> tuple[int, ...] | None:
        """Fewest seconds of what fits; None if that takes more than ``ceiling``."""
        end = self._walk(self._within(budget, ceiling), _thinned)
        return None if end is None else end.choices()

    def least_seconds(self, budget: int) -> float:
        """Seconds that no choice within the budget goes below."""
        if not self._tiling.is_exact:
            return 0.0
        end = self._walk(self._within(budget, math.inf), _merged)
        return 0.0 if end is None else end.value

    def lowest(self) -> tuple[int, ...] | None:
        """Lowest peak."""
        end = self._walk(_Lowest(), _thinned)
        return None if end is None else end.choices()

    def _within(self, budget: int, ceiling: float) -> _Fastest:
        return _Fastest(budget, ceiling, self._tiling.least_rest)

    def _walk(self, walk: _Walk, thin: Callable[[list[_State]], list[_State]]) -> _State | None:
        """The best state at the end, or None."""
        places = range(self._count + 1)
        reached: list[dict[Held, list[_State]]] = [defaultdict(list) for _ in places]
        reached[0][frozenset()].append(_State(0, 0.0))
        ends: list[_State] = []
        for place in places:
            for held, states in reached[place].items():
                best = thin(_undominated(states))
                for step in self._tiling.steps(place, held):
                    tile = step.tile
                    there = reached[tile.stop][step.after] if place < self._count else ends
                    for state in best:
                        if (value := walk.value(state, step)) is not None:
                            stored = state.stored_bytes + tile.stored_bytes
                            there.append(_State(stored, value, tile, state))
            reached[place].clear()
        return min(ends, key=lambda state: state.value, default=None)


def _undominated(states: list[_State]) -> list[_State]:
    """Those that no other beats in both numbers, by rising bytes."""
    states.sort(key=lambda state: (state.stored_bytes, state.value))
    best: list[_State] = []
    for state in states:
        if not best or state.value < best[-1].value:
            best.append(state)
    return best


def _thinned(states: list[_State]) -> list[_State]:
    """A number of states that is quick, the one of fewest bytes among them."""
    return [bucket[-1] if i else bucket[0] for i, bucket in enumerate(_buckets(states))]


def _merged(states: list[_State]) -> list[_State]:
    """As many states, each as good in both numbers as any that it stands for."""
    return [bucket[-1]._replace(stored_bytes=bucket[0].stored_bytes) for bucket in _buckets(states)]


def _buckets(states: list[_State]) -> list[list[_State]]:
    """Neighbours in bytes together, the ones of fewest bytes alone."""
    if len(states) <= MOST_STATES:
        return [[state] for state in states]
    low, high = states[0].stored_bytes, states[-1].stored_bytes
    buckets: dict[int, list[_State]] = defaultdict(list)
    for state in states[1:]:
        number = (state.stored_bytes - low) * (MOST_STATES - 2) // max(1, high - low)
        buckets[number].append(state)
    return [states[:1], *buckets.values()]
