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
of :func:`memfit.solvers.problem.loads`. The prefixes A and L keep a row as short as the options of
one region. Depends on PuLP.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from memfit.solvers import _compat, search
from memfit.solvers.problem import DEFAULT_LIMITS, Limits, Problem, SharedTensor, Solution
from memfit.solvers.search import Program, Scale

NAME = "flat_ilp"


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Fewest seconds within the budget; at the same seconds, lowest peak."""
    return search.solve(problem, limits, METHOD, NAME)


def minimise_peak(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Lowest peak of all choices, whatever the budget; at the same peak, fewest seconds."""
    return search.minimise_peak(problem, limits, METHOD, NAME)


def formulate(problem: Problem, scale: Scale) -> Program:
    """The program above, without objective and budget."""
    program = _compat.program("memfit")
    chosen = tuple(
        tuple(
            program.add_variable(f"x_{r}_{o}", 0, 1, "Binary") for o in range(len(region.options))
        )
        for r, region in enumerate(problem.regions)
    )
    for binaries in chosen:
        program += _compat.total(binaries) == 1
    seconds = tuple(
        (option.recompute_seconds, binary)
        for region, binaries in zip(problem.regions, chosen, strict=True)
        for option, binary in zip(region.options, binaries, strict=True)
    )

    def read() -> tuple[int, ...]:
        return tuple(max(range(len(own)), key=lambda o: own[o].value()) for own in chosen)

    rows = _rows(problem, program, chosen, scale.unit)
    return Program(program, rows, seconds, scale.divisor, read)


def _rows(
    problem: Problem, program: Any, chosen: Sequence[Sequence[Any]], unit: float
) -> tuple[tuple[Any, int], ...]:
    stored = _stored_prefixes(problem, program, chosen, unit)
    held = [_Held(program, chosen, tensor, t) for t, tensor in enumerate(problem.shared)]
    rows = []
    for index, base in binding_moments(problem):
        moment = problem.moments[index]
        terms = [1 * stored[moment.stored]]
        if moment.region is not None:
            for option, binary in zip(
                problem.regions[moment.region].options, chosen[moment.region], strict=True
            ):
                terms.append(option.work_bytes(moment.phase) / unit * binary)
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


def binding_moments(problem: Problem) -> list[tuple[int, int]]:
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


METHOD = search.ByProgram(formulate)
