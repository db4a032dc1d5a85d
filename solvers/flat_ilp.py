"""The flat integer program: one binary for each option of each region, one row for each moment.

    x[r,o] in {0,1}      region r runs option o             sum_o x[r,o] = 1
    A[r] >= 0            bytes stored before region r       A[r+1] = A[r] + sum_o stored[r,o] x[r,o]
    L[t,k] in [0,1]      one of the first k regions that may hold tensor t holds it
                         L[t,k+1] >= L[t,k]
                         L[t,k+1] >= sum_o x[r,o] over its holders in the next of them, r
    row of a moment      A[stored] + sum_o (forward or backward)[r,o] x[r,o] + sum_t size[t] L[t,k]
                         <= budget - base
    min                  sum_r,o seconds[r,o] x[r,o]

It is a multiple-choice knapsack with one capacity for each forward and backward. The rows are those
of :func:`memfit.solvers.problem.loads`, which has the last word: a choice is returned only if its
exact bytes fit. The prefixes A and L keep a row as short as the options of one region. A second
program then lowers the peak at the same seconds.

A solver compares reals within a tolerance, here one part in 10^10 of the room above the base. Sizes
come in multiples of their greatest common divisor, so the rows are exact while the room is below
10^10 times that (10 GB at 1 byte, 5 TB at CUDA's 512). Depends on PuLP.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memfit.solvers import _compat
from memfit.solvers.ordering import in_order
from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Option,
    Problem,
    SharedTensor,
    Solution,
    Status,
    describe,
    peak_bytes,
    recompute_seconds,
    seconds_ceiling,
)

NAME = "ilp"
RANGE = 1e4
"""Rows and objectives are scaled to this size: far above the tolerances and easy on the solver."""
TIGHTENINGS = 4
"""Times that a choice over the budget, let through by the tolerance, is answered by a lower one."""
PEAK_SHARE = 0.1
"""Share of the time limit that may go into a lower peak at the same seconds."""


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Fewest seconds within the budget; at the same seconds, lowest peak."""
    started = time.perf_counter()
    found = _fastest_fitting(problem, limits)
    if found.choices and recompute_seconds(problem, found.choices) <= limits.gap_seconds:
        # As good as free is not free: a budget that fits all must recompute nothing.
        exact = replace(_left(limits, started), gap_seconds=0.0)
        found = _fastest_fitting(problem, exact)
    if found.choices is not None:
        seconds = min(_left(limits, started).seconds, limits.seconds * PEAK_SHARE)
        lower = _lower(problem, found.choices, replace(limits, seconds=seconds))
        found = replace(found, choices=lower)
    return _solution(problem, found, started)


def minimise_peak(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Lowest peak of all choices, whatever the budget; at the same peak, fewest seconds.

    The bound and the gap are those of the seconds at that peak.
    """
    started = time.perf_counter()
    lowest = _lowest(problem, limits)
    if lowest.choices is None:
        return _solution(problem, lowest, started)
    at_peak = replace(problem, budget_bytes=peak_bytes(problem, lowest.choices))
    found = _fastest_fitting(at_peak, _left(limits, started))
    if found.choices is None:
        found = replace(lowest, bound=0.0, status=Status.FEASIBLE)
    if lowest.status is not Status.OPTIMAL:
        found = replace(found, status=lowest.status)
    return _solution(problem, found, started)


@dataclass(frozen=True, slots=True)
class _Found:
    """How one pass ended: a choice, or None, and a bound on its objective."""

    status: Status
    choices: tuple[int, ...] | None = None
    bound: float = 0.0


def _fastest_fitting(problem: Problem, limits: Limits) -> _Found:
    """The fastest choice whose exact bytes fit, whatever the tolerance let through."""
    started, budget = time.perf_counter(), problem.budget_bytes
    first = found = _fastest(problem, budget, limits)
    for attempt in range(TIGHTENINGS):
        if found.choices is None:
            break
        excess = peak_bytes(problem, found.choices) - budget
        if excess <= 0:
            return _bounded(problem, found.choices, first.bound, limits) if attempt else found
        found = _fastest(problem, budget - excess * 2**attempt, _left(limits, started))
    if first.choices is None:
        return first
    # Only choices within the tolerance of the budget are left: the lowest of all may be one.
    lowest = _lowest(problem, _left(limits, started))
    if lowest.choices is not None and peak_bytes(problem, lowest.choices) <= budget:
        return _bounded(problem, lowest.choices, first.bound, limits)
    return _Found(Status.INFEASIBLE if lowest.status is Status.OPTIMAL else Status.UNSOLVED)


def _bounded(problem: Problem, choices: tuple[int, ...], bound: float, limits: Limits) -> _Found:
    """A choice of a tightened program, judged by the bound of the program as it was stated."""
    seconds = recompute_seconds(problem, choices)
    is_proved = seconds_ceiling(bound) >= seconds - max(seconds * limits.gap, limits.gap_seconds)
    return _Found(Status.OPTIMAL if is_proved else Status.FEASIBLE, choices, bound)


def _lower(problem: Problem, choices: tuple[int, ...], limits: Limits) -> tuple[int, ...]:
    """A choice as fast as ``choices`` with a lower peak, or ``choices`` itself."""
    ceiling = seconds_ceiling(recompute_seconds(problem, choices))
    lower = _lowest(problem, limits, ceiling).choices
    if lower is None or recompute_seconds(problem, lower) > ceiling:
        lower = choices
    return in_order(problem, min(choices, lower, key=lambda choice: peak_bytes(problem, choice)))


def _fastest(problem: Problem, budget: int, limits: Limits) -> _Found:
    """Fewest seconds within a budget, to the tolerance of the solver."""
    model = _Model.build(problem, budget - _lowest_base(problem))
    program, unit = model.program, _slowest_seconds(problem) / RANGE or 1.0
    program += _compat.total(
        option.recompute_seconds / unit * binary for option, binary in _pairs(problem, model.chosen)
    )
    for row, base in model.rows:
        # Bytes come in multiples of the divisor, so a row may as well end at one.
        room = (budget - base) // model.divisor * model.divisor
        program += row <= room / model.unit
    return model.run(limits, unit, limits.gap_seconds / unit)


def _lowest(problem: Problem, limits: Limits, ceiling: float = math.inf) -> _Found:
    """Lowest peak of the choices that take at most ``ceiling`` seconds."""
    if not all(region.options for region in problem.regions):
        return _Found(Status.INFEASIBLE)
    lowest_base = _lowest_base(problem)
    any_choice = [0] * len(problem.regions)
    model = _Model.build(problem, peak_bytes(problem, any_choice) - lowest_base)
    program, peak = model.program, model.program.add_variable("peak", 0, None)
    program += 1 * peak
    for row, base in model.rows:
        program += row + (base - lowest_base) / model.unit <= peak
    if ceiling < math.inf:
        _take_at_most(problem, model, ceiling)
    return model.run(limits, model.unit)


def _take_at_most(problem: Problem, model: "_Model", ceiling: float) -> None:
    """Rows that hold the seconds to ``ceiling``, each coefficient at most ``RANGE``."""
    program, terms = model.program, []
    for option, binary in _pairs(problem, model.chosen):
        if option.recompute_seconds > ceiling:
            program += binary <= 0
        else:
            terms.append(option.recompute_seconds / ceiling * RANGE * binary)
    program += _compat.total(terms) <= RANGE


@dataclass(frozen=True, slots=True)
class _Model:
    """The variables and rows of a problem, without an objective or a budget."""

    program: Any
    chosen: tuple[tuple[Any, ...], ...]
    """The binaries, by region and option."""
    rows: tuple[tuple[Any, int], ...]
    """For each distinct moment its bytes above the base, in units of ``unit``, and its base."""
    unit: float
    divisor: int

    @classmethod
    def build(cls, problem: Problem, room: int) -> "_Model":
        """The model with its rows scaled so that ``room`` bytes are at most about ``RANGE``."""
        program = _compat.program("memfit")
        divisor = _divisor(problem)
        unit = max(divisor, room / RANGE)
        chosen = tuple(
            tuple(
                program.add_variable(f"x_{r}_{o}", 0, 1, "Binary")
                for o in range(len(region.options))
            )
            for r, region in enumerate(problem.regions)
        )
        for binaries in chosen:
            program += _compat.total(binaries) == 1
        rows = _rows(problem, program, chosen, unit)
        return cls(program, chosen, rows, unit, divisor)

    def run(self, limits: Limits, objective_unit: float, gap: float = 0.0) -> _Found:
        outcome = _compat.minimise(self.program, limits.gap, limits.seconds, gap)
        if outcome.status in (Status.INFEASIBLE, Status.UNSOLVED):
            return _Found(outcome.status)
        choices = tuple(
            max(range(len(binaries)), key=lambda o: binaries[o].value()) for binaries in self.chosen
        )
        return _Found(outcome.status, choices, outcome.bound * objective_unit)


def _rows(
    problem: Problem, program: Any, chosen: Sequence[Sequence[Any]], unit: float
) -> tuple[tuple[Any, int], ...]:
    stored = _stored_prefixes(problem, program, chosen, unit)
    held = [_Held(program, chosen, tensor, t) for t, tensor in enumerate(problem.shared)]
    rows = []
    for index, base in _binding_moments(problem):
        moment = problem.moments[index]
        terms = [1 * stored[moment.stored]]
        if moment.region is not None:
            for option, binary in zip(
                problem.regions[moment.region].options, chosen[moment.region], strict=True
            ):
                is_forward = moment.phase == "forward"
                size = option.forward_bytes if is_forward else option.backward_bytes
                terms.append(size / unit * binary)
        for tensor, holding in zip(problem.shared, held, strict=True):
            if index in tensor.moments:
                alive = holding.alive(moment.stored, moment.region)
                terms.append(tensor.size_bytes / unit * alive)
        rows.append((_compat.total(terms), base))
    return tuple(rows)


def _stored_prefixes(
    problem: Problem, program: Any, chosen: Sequence[Sequence[Any]], unit: float
) -> list[Any]:
    """A[r]: bytes stored by the regions before r."""
    prefixes = [program.add_variable("stored_0", 0, 0)]
    for r, region in enumerate(problem.regions):
        prefix = program.add_variable(f"stored_{r + 1}", 0, None)
        own = (
            option.stored_bytes / unit * binary
            for option, binary in zip(region.options, chosen[r], strict=True)
        )
        program += prefix == prefixes[-1] + _compat.total(own)
        prefixes.append(prefix)
    return prefixes


class _Held:
    """L[t, k] of one shared tensor, and what is alive of it at a moment.

    The variables are bounded from below only; that they stand in rows with an upper limit is what
    keeps them down.
    """

    def __init__(
        self, program: Any, chosen: Sequence[Sequence[Any]], tensor: SharedTensor, number: int
    ) -> None:
        self.program, self.number = program, number
        self.regions = sorted({r for r, _ in tensor.holders})
        self.own = {
            r: _compat.total(chosen[r][o] for o in {o for s, o in tensor.holders if s == r})
            for r in self.regions
        }
        self.prefixes = [program.add_variable(f"held_{number}_0", 0, 0)]
        for r in self.regions:
            self.prefixes.append(self._either(self.prefixes[-1], r, f"{len(self.prefixes)}"))
        self.others: dict[tuple[int, int], Any] = {}

    def alive(self, stored: int, region: int | None) -> Any:
        """1 if a chosen holder is before ``stored`` or is ``region``, in any solution."""
        before = bisect_left(self.regions, stored)
        if region is None or region < stored or region not in self.own:
            return self.prefixes[before]
        if self.regions[before] == region:
            return self.prefixes[before + 1]
        if (before, region) not in self.others:
            self.others[before, region] = self._either(
                self.prefixes[before], region, f"{before}_and_{region}"
            )
        return self.others[before, region]

    def _either(self, prefix: Any, region: int, name: str) -> Any:
        program = self.program
        either = program.add_variable(f"held_{self.number}_{name}", 0, 1)
        program += either >= 1 * prefix
        program += either >= self.own[region]
        return either


def _binding_moments(problem: Problem) -> list[tuple[int, int]]:
    """Of moments that differ in nothing but their base, the index and base of the highest."""
    tensors: list[list[int]] = [[] for _ in problem.moments]
    for number, tensor in enumerate(problem.shared):
        for index in set(tensor.moments):
            tensors[index].append(number)
    highest: dict[object, tuple[int, int]] = {}
    for index, moment in enumerate(problem.moments):
        work = None if moment.region is None else (moment.region, moment.phase)
        key = (moment.stored, work, tuple(tensors[index]))
        if key not in highest or moment.base_bytes > highest[key][1]:
            highest[key] = (index, moment.base_bytes)
    return list(highest.values())


def _pairs(problem: Problem, chosen: Sequence[Sequence[Any]]) -> Iterator[tuple[Option, Any]]:
    """Every option with its binary."""
    for region, binaries in zip(problem.regions, chosen, strict=True):
        yield from zip(region.options, binaries, strict=True)


def _slowest_seconds(problem: Problem) -> float:
    return sum(
        max((option.recompute_seconds for option in region.options), default=0.0)
        for region in problem.regions
    )


def _lowest_base(problem: Problem) -> int:
    return min((moment.base_bytes for moment in problem.moments), default=0)


def _divisor(problem: Problem) -> int:
    """Greatest number of bytes that all sizes are multiples of."""
    options = [option for region in problem.regions for option in region.options]
    sizes = [tensor.size_bytes for tensor in problem.shared]
    for option in options:
        sizes += option.stored_bytes, option.forward_bytes, option.backward_bytes
    return math.gcd(*sizes) or 1


def _left(limits: Limits, started: float) -> Limits:
    """The limits less the time since ``started``, though never too little to look at all."""
    return replace(limits, seconds=max(0.1, limits.seconds - (time.perf_counter() - started)))


def _solution(problem: Problem, found: _Found, started: float) -> Solution:
    took = time.perf_counter() - started
    if found.choices is None:
        return Solution((), found.status, 0.0, 0, NAME, solve_seconds=took)
    return describe(
        problem,
        found.choices,
        found.status,
        NAME,
        bound_seconds=found.bound,
        solve_seconds=took,
    )
