"""The search that the integer programs share: fastest within a budget, then lowest peak.

A formulation turns a problem into a :class:`Program`: variables, a row of bytes for each moment
that can bind, seconds. The search minimises seconds under the rows, then lowers the peak at the
same seconds with a second program. :func:`memfit.solvers.problem.loads` has the last word: a choice
is returned only if its exact bytes fit.

A solver compares reals within a tolerance, here one part in 10^10 of the room above the base. Sizes
come in multiples of their greatest common divisor, so the rows are exact while the room is below
10^10 times that (10 GB at 1 byte, 5 TB at CUDA's 512). Depends on PuLP.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from memfit.solvers import _compat
from memfit.solvers.ordering import in_order
from memfit.solvers.problem import (
    Limits,
    Problem,
    Solution,
    Status,
    describe,
    peak_bytes,
    recompute_seconds,
    seconds_ceiling,
)

RANGE = 1e4
"""Rows and objectives are scaled to this size: far above the tolerances and easy on the solver."""
TIGHTENINGS = 4
"""Times that a choice over the budget, let through by the tolerance, is answered by a lower one."""
PEAK_SHARE = 0.1
"""Share of the time limit that may go into a lower peak at the same seconds."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What one unit of a row is in bytes, and the number that all bytes are multiples of."""

    unit: float
    divisor: int

    @classmethod
    def of(cls, problem: Problem, room: int) -> "Scale":
        """Makes ``room`` bytes at most about ``RANGE``."""
        divisor = _divisor(problem)
        return cls(max(divisor, room / RANGE), divisor)


@dataclass(frozen=True, slots=True)
class Program:
    """The variables and rows of a problem, without an objective or a budget."""

    program: Any
    rows: tuple[tuple[Any, int], ...]
    """For each moment that can bind its bytes above the base, in units of the scale, and its base.
    """
    seconds: tuple[tuple[float, Any], ...]
    """Seconds of recomputation, each with the variable that says how often."""
    divisor: int
    """What the bytes of a row are multiples of, whatever is chosen."""
    read: Callable[[], tuple[int, ...]]
    """The choice that the variables stand for once they have values."""


Formulation = Callable[[Problem, Scale], Program]


@dataclass(frozen=True, slots=True)
class Found:
    """How one search ended: a choice, or None, and a bound on its objective."""

    status: Status
    choices: tuple[int, ...] | None = None
    bound: float = 0.0
    variables: int = 0
    rows: int = 0
    note: str = ""


class Method(Protocol):
    """Finds the two optima that make up a solution."""

    def fastest(self, problem: Problem, limits: Limits) -> Found:
        """Fewest seconds of the choices whose exact bytes fit."""

    def lowest(self, problem: Problem, limits: Limits, ceiling: float = math.inf) -> Found:
        """Lowest peak of the choices that take at most ``ceiling`` seconds."""


def solve(problem: Problem, limits: Limits, method: Method, name: str) -> Solution:
    """Fewest seconds within the budget; at the same seconds, lowest peak."""
    started = time.perf_counter()
    found = _unhindered(problem) or method.fastest(problem, limits)
    if found.choices and recompute_seconds(problem, found.choices) <= limits.gap_seconds:
        # As good as free is not free: a budget that fits all must recompute nothing.
        found = method.fastest(problem, replace(left(limits, started), gap_seconds=0.0))
    if found.choices is not None and limits.lowest_peak:
        seconds = min(left(limits, started).seconds, limits.seconds * PEAK_SHARE)
        lower = _lower(problem, found.choices, replace(limits, seconds=seconds), method)
        found = replace(found, choices=lower)
    elif found.choices is not None:
        found = replace(found, choices=in_order(problem, found.choices))
    return _solution(problem, found, name, started)


def minimise_peak(problem: Problem, limits: Limits, method: Method, name: str) -> Solution:
    """Lowest peak of all choices, whatever the budget; at the same peak, fewest seconds.

    The bound and the gap are those of the seconds at that peak.
    """
    started = time.perf_counter()
    found = method.lowest(problem, limits)
    if found.choices is None:
        return _solution(problem, found, name, started)
    at_peak = replace(problem, budget_bytes=peak_bytes(problem, found.choices))
    fastest = method.fastest(at_peak, left(limits, started))
    if fastest.choices is None:
        fastest = replace(found, bound=0.0, status=Status.FEASIBLE)
    if found.status is not Status.OPTIMAL:
        fastest = replace(fastest, status=found.status)
    return _solution(problem, fastest, name, started)


def _unhindered(problem: Problem) -> Found | None:
    """The fastest choice of all where the budget lets it pass, which then is the exact optimum."""
    if not all(region.options for region in problem.regions):
        return None
    fastest = tuple(
        min(range(len(region.options)), key=lambda o: region.options[o].recompute_seconds)
        for region in problem.regions
    )
    if peak_bytes(problem, fastest) > problem.budget_bytes:
        return None
    return Found(Status.OPTIMAL, fastest, recompute_seconds(problem, fastest))


def _lower(
    problem: Problem, choices: tuple[int, ...], limits: Limits, method: Method
) -> tuple[int, ...]:
    """A choice as fast as ``choices`` with a lower peak, or ``choices`` itself."""
    ceiling = seconds_ceiling(recompute_seconds(problem, choices))
    lower = method.lowest(problem, limits, ceiling).choices
    if lower is None or recompute_seconds(problem, lower) > ceiling:
        lower = choices
    return in_order(problem, min(choices, lower, key=lambda choice: peak_bytes(problem, choice)))


@dataclass(frozen=True, slots=True)
class ByProgram:
    """The method that solves one formulation."""

    formulate: Formulation

    def fastest(self, problem: Problem, limits: Limits) -> Found:
        """The fastest choice whose exact bytes fit, whatever the tolerance let through."""
        started, budget = time.perf_counter(), problem.budget_bytes
        first = found = self.fastest_within(problem, budget, limits)
        for attempt in range(TIGHTENINGS):
            if found.choices is None:
                break
            excess = peak_bytes(problem, found.choices) - budget
            if excess <= 0:
                return judged(problem, found, first.bound, limits) if attempt else found
            found = self.fastest_within(
                problem, budget - excess * 2**attempt, left(limits, started)
            )
        if first.choices is None:
            return first
        # Only choices within the tolerance of the budget are left: the lowest of all may be one.
        low = self.lowest(problem, left(limits, started))
        if low.choices is not None and peak_bytes(problem, low.choices) <= budget:
            return judged(problem, low, first.bound, limits)
        return Found(Status.INFEASIBLE if low.status is Status.OPTIMAL else Status.UNSOLVED)

    def fastest_within(self, problem: Problem, budget: int, limits: Limits) -> Found:
        """Fewest seconds within a budget, to the tolerance of the solver."""
        scale = Scale.of(problem, budget - _lowest_base(problem))
        model = self.formulate(problem, scale)
        program, unit = model.program, _slowest_seconds(problem) / RANGE or 1.0
        program += _compat.total(seconds / unit * variable for seconds, variable in model.seconds)
        for row, base in model.rows:
            # Bytes come in multiples of the divisor, so a row may as well end at one.
            room = (budget - base) // model.divisor * model.divisor
            program += row <= room / scale.unit
        return _run(model, limits, unit, limits.gap_seconds / unit)

    def lowest(self, problem: Problem, limits: Limits, ceiling: float = math.inf) -> Found:
        """Lowest peak, to the tolerance of the solver. The bound is in bytes."""
        if not all(region.options for region in problem.regions):
            return Found(Status.INFEASIBLE)
        lowest_base = _lowest_base(problem)
        any_choice = [0] * len(problem.regions)
        scale = Scale.of(problem, peak_bytes(problem, any_choice) - lowest_base)
        model = self.formulate(problem, scale)
        program, peak = model.program, model.program.add_variable("peak", 0, None)
        program += 1 * peak
        for row, base in model.rows:
            program += row + (base - lowest_base) / scale.unit <= peak
        if ceiling < math.inf:
            _take_at_most(model, ceiling)
        found = _run(model, limits, scale.unit)
        return replace(found, bound=found.bound + lowest_base)


def judged(problem: Problem, found: Found, bound: float, limits: Limits) -> Found:
    """A choice of a program, judged by the bound of another one that says more."""
    seconds = recompute_seconds(problem, found.choices or ())
    is_proved = seconds_ceiling(bound) >= seconds - max(seconds * limits.gap, limits.gap_seconds)
    return replace(found, status=Status.OPTIMAL if is_proved else Status.FEASIBLE, bound=bound)


def _take_at_most(model: Program, ceiling: float) -> None:
    """Rows that hold the seconds to ``ceiling``, each coefficient at most ``RANGE``."""
    program, terms = model.program, []
    for seconds, variable in model.seconds:
        if seconds > ceiling:
            program += variable <= 0
        else:
            terms.append(seconds / ceiling * RANGE * variable)
    program += _compat.total(terms) <= RANGE


def _run(model: Program, limits: Limits, objective_unit: float, gap: float = 0.0) -> Found:
    outcome = _compat.minimise(model.program, limits.gap, limits.seconds, gap)
    about = outcome.variables, outcome.rows, outcome.note
    if outcome.status in (Status.INFEASIBLE, Status.UNSOLVED):
        return Found(outcome.status, None, 0.0, *about)
    return Found(outcome.status, model.read(), outcome.bound * objective_unit, *about)


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


def left(limits: Limits, started: float) -> Limits:
    """The limits less the time since ``started``, though never too little to look at all."""
    return replace(limits, seconds=max(0.1, limits.seconds - (time.perf_counter() - started)))


def _solution(problem: Problem, found: Found, name: str, started: float) -> Solution:
    if found.choices is None:
        solution = Solution((), found.status, 0.0, 0, name)
    else:
        solution = describe(problem, found.choices, found.status, name, bound_seconds=found.bound)
    took = time.perf_counter() - started
    return replace(
        solution,
        solve_seconds=took,
        variables=found.variables,
        rows=found.rows,
        note=found.note,
    )
