"""Runs of identical regions: stretches of a problem that can be counted in place of enumerated.

In a run the regions are of one kind, and their rows differ in nothing but a base that rises or
falls by the same number of bytes from each region to the next. Depends on the records alone.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from memfit.solvers.flat_ilp import binding_moments
from memfit.solvers.problem import Phase, Problem

SHORTEST = 3
"""Fewer identical regions than this are as well enumerated."""

RowKey = tuple[Phase | Literal["after"], frozenset[int]]
"""``forward``, ``backward`` or ``after``, and the shared tensors that the row counts."""


@dataclass(frozen=True, slots=True)
class Line:
    """The same row of every region of a run."""

    key: RowKey
    base_bytes: int
    """Of the first region."""
    step_bytes: int
    """How much more it is in each further region."""


@dataclass(frozen=True, slots=True)
class Run:
    """Regions ``start`` to ``stop - 1``."""

    start: int
    stop: int
    lines: tuple[Line, ...]
    """Empty where the only region's rows are those of the problem."""

    @property
    def length(self) -> int:
        return self.stop - self.start


def find_runs(problem: Problem) -> tuple[Run, ...]:
    """The regions of a problem, in order, as runs; most of one region if few are alike."""
    layout = _Layout(problem)
    runs: list[Run] = []
    start = 0
    while start < len(problem.regions):
        run = layout.longest(start)
        runs.append(run if run.length >= SHORTEST else Run(start, start + 1, ()))
        start = runs[-1].stop
    return tuple(runs)


class _Layout:
    """The rows of each region, and whether they are all that there is of it."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        tensors: dict[int, set[int]] = defaultdict(set)
        for number, tensor in enumerate(problem.shared):
            for index in tensor.moments:
                tensors[index].add(number)
        self._rows: list[dict[RowKey, int]] = [{} for _ in problem.regions]
        # Places where a row of another shape looks: no run reaches across.
        self._cuts: set[int] = set()
        self._alone: set[int] = set()
        for index, base in binding_moments(problem):
            moment = problem.moments[index]
            present = frozenset(tensors[index])
            if moment.region is None:
                if moment.stored > 0:
                    self._rows[moment.stored - 1]["after", present] = base
            elif moment.region == moment.stored:
                self._rows[moment.region][moment.phase, present] = base
            else:
                self._cuts.add(moment.stored)
                self._alone.add(moment.region)
        self._holders: list[set[tuple[int, int]]] = [set() for _ in problem.regions]
        for number, tensor in enumerate(problem.shared):
            for r, o in tensor.holders:
                self._holders[r].add((number, o))

    def longest(self, start: int) -> Run:
        """The longest run from ``start`` on."""
        stop = start + 1
        steps: dict[RowKey, int] = {}
        while stop < len(self._problem.regions) and self._continues(start, stop, steps):
            stop += 1
        lines = (Line(key, base, steps.get(key, 0)) for key, base in self._rows[start].items())
        return Run(start, stop, tuple(lines))

    def _continues(self, start: int, next_: int, steps: dict[RowKey, int]) -> bool:
        regions, rows = self._problem.regions, self._rows
        if self._alone & {start, next_} or next_ in self._cuts:
            return False
        alike = (
            regions[start].kind == regions[next_].kind
            and rows[start].keys() == rows[next_].keys()
            and self._holders[start] == self._holders[next_]
        )
        if not alike:
            return False
        rises = {key: rows[next_][key] - rows[next_ - 1][key] for key in rows[start]}
        if not steps:
            steps.update(rises)
        return rises == steps
