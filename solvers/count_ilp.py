"""The counting integer program: how many regions of a run take each option, whatever its length.

A run is a stretch of identical regions (see :mod:`memfit.solvers.runs`). Its options stand in a
fixed order, and each takes a block of neighbouring regions:

    n[o] in {0..length}   regions that run option o        sum_o n[o] = length
    y[o] in {0,1}         whether there are any            n[o] <= length y[o]
    S[o], c[o]            stored bytes and number of the regions in the blocks before
    row of a block        A + S[o] + own[o] + base + step c[o] + sum_t size[t] L[t, o]
                          and the same for the block's last region, if there is any

A row is linear within a block, so that its first and its last region bind. An empty block's rows
are off: they then stand at the place of the next block, whose row bounds them, which gives the
constants that go with ``1 - y``. Regions that are alone keep the rows of the flat program.

The order: two neighbours swapped leave all other rows as they are, so backward rows are best served
as in the two-machine flow shop (Johnson, 1954): with net = stored + step of the backward's base,
first net < 0 by rising peak, then net >= 0 by falling peak - net. That proves the order for these
rows alone. The program without the others, and without what shared tensors add within a run, is
therefore a bound on every choice; where its choice does not fit, the full program's does not reach
the bound and the flat program is asked. Depends on PuLP.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, Literal

from memfit.solvers import _compat, flat_ilp, search
from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Option,
    Phase,
    Problem,
    Solution,
    Status,
    peak_bytes,
    recompute_seconds,
    seconds_ceiling,
)
from memfit.solvers.runs import Line, Run, find_runs
from memfit.solvers.search import Found, Program, Scale

NAME = "count_ilp"
"""It solves any problem; what has no runs, as the flat program."""


def solve(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Fewest seconds within the budget; at the same seconds, lowest peak."""
    return search.solve(problem, limits, _method(problem), NAME)


def minimise_peak(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Lowest peak of all choices, whatever the budget; at the same peak, fewest seconds."""
    return search.minimise_peak(problem, limits, _method(problem), NAME)


def _method(problem: Problem) -> search.Method:
    """Counting, if there is anything to count."""
    runs = find_runs(problem)
    if not all(r.options for r in problem.regions) or not any(run.lines for run in runs):
        return flat_ilp.METHOD

    def by(is_bound: bool) -> search.ByProgram:
        return search.ByProgram(
            lambda problem, scale: _Writer(problem, scale, runs, is_bound).write()
        )

    return _Counting(by(is_bound=True), by(is_bound=False))


@dataclass(frozen=True, slots=True)
class _Counting:
    """The method: bound, full program, flat program, as far as it takes."""

    bound: search.ByProgram
    """Without the rows that the order is not proved for."""
    full: search.ByProgram

    def fastest(self, problem: Problem, limits: Limits) -> Found:
        started = time.perf_counter()
        bound = self.bound.fastest_within(problem, problem.budget_bytes, limits)
        if bound.choices is None:
            return bound
        if peak_bytes(problem, bound.choices) <= problem.budget_bytes:
            return bound
        found = self.full.fastest(problem, search.left(limits, started))
        if found.choices is not None:
            found = search.judged(problem, found, bound.bound, limits)
        if found.status is Status.OPTIMAL:
            return found
        flat = flat_ilp.METHOD.fastest(problem, search.left(limits, started))
        if flat.choices is None and found.choices is not None:
            return found
        return flat

    def lowest(self, problem: Problem, limits: Limits, ceiling: float = math.inf) -> Found:
        started = time.perf_counter()
        found = self.full.lowest(problem, limits, ceiling)
        if found.choices is None:
            return flat_ilp.METHOD.lowest(problem, search.left(limits, started), ceiling)
        peak = peak_bytes(problem, found.choices)
        bound = self.bound.lowest(problem, search.left(limits, started), ceiling).bound
        is_allowed = recompute_seconds(problem, found.choices) <= seconds_ceiling(ceiling)
        if is_allowed and peak <= bound * (1 + 1e-9):
            return found
        flat = flat_ilp.METHOD.lowest(problem, search.left(limits, started), ceiling)
        return found if flat.choices is None else flat


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the writer stands between two blocks of a run."""

    stored: Any
    count: Any
    held: dict[int, Any]


class _Writer:
    """Writes the program of a problem, or the bound's."""

    def __init__(
        self, problem: Problem, scale: Scale, runs: tuple[Run, ...], is_bound: bool
    ) -> None:
        self.problem = problem
        self.runs = runs
        self.unit, self.divisor = scale.unit, scale.divisor
        self.is_bound = is_bound
        self.program = _compat.program("memfit")
        self.rows: list[tuple[Any, int]] = []
        self.seconds: list[tuple[float, Any]] = []
        self.stored = {0: self._variable("stored_0", 0)}
        self.held = {(t, 0): self._variable(f"held_{t}_0", 0) for t in self._tensors()}
        self.blocks: list[tuple[Run, list[tuple[int, Any]]]] = []

    def write(self) -> Program:
        for run in self.runs:
            if run.lines:
                self._write_run(run)
            else:
                self._write_alone(run.start)
        alone = {run.start for run, _ in self.blocks if not run.lines}
        binaries = {run.start: dict(pairs) for run, pairs in self.blocks}
        for index, base in flat_ilp.binding_moments(self.problem):
            moment = self.problem.moments[index]
            if moment.region in alone or (moment.region is None and moment.stored in self.stored):
                self._write_moment(index, base, binaries)
        rows, seconds = tuple(self.rows), tuple(self.seconds)
        return Program(self.program, rows, seconds, self.divisor, self._read)

    # -- regions that are alone ------------------------------------------------------------------

    def _write_alone(self, r: int) -> None:
        options = self.problem.regions[r].options
        own = [
            (o, self.program.add_variable(f"x_{r}_{o}", 0, 1, "Binary"))
            for o in range(len(options))
        ]
        self.program += _compat.total(x for _, x in own) == 1
        self.seconds += [(options[o].recompute_seconds, x) for o, x in own]
        self.blocks.append((Run(r, r + 1, ()), own))
        self._pass(r, r + 1, [options[o].stored_bytes / self.unit * x for o, x in own])
        for t in self._tensors():
            holding = _compat.total(x for o, x in own if (r, o) in self.problem.shared[t].holders)
            self.held[t, r + 1] = self._either(self.held[t, r], holding, f"held_{t}_{r + 1}")

    def _write_moment(self, index: int, base: int, binaries: dict[int, dict[int, Any]]) -> None:
        """The row of a moment as the flat program has it."""
        moment = self.problem.moments[index]
        terms = [1 * self.stored[moment.stored]]
        r = moment.region
        if r is not None:
            for o, x in binaries[r].items():
                size = self.problem.regions[r].options[o].work_bytes(moment.phase)
                terms.append(size / self.unit * x)
        for t, tensor in enumerate(self.problem.shared):
            if index not in tensor.moments:
                continue
            alive = self.held[t, moment.stored]
            if r is not None and r >= moment.stored:
                own = _compat.total(x for o, x in binaries[r].items() if (r, o) in tensor.holders)
                alive = self._either(alive, own, f"alive_{t}_{index}")
            terms.append(tensor.size_bytes / self.unit * alive)
        self.rows.append((_compat.total(terms), base))

    # -- runs ------------------------------------------------------------------------------------

    def _write_run(self, run: Run) -> None:
        options = self.problem.regions[run.start].options
        self.divisor = math.gcd(self.divisor, *(line.step_bytes for line in run.lines))
        pairs: list[tuple[int, Any]] = []
        place = _Place(
            1 * self.stored[run.start], 0, {t: self.held[t, run.start] for t in self._tensors()}
        )
        for o in self._order(run):
            name = f"{run.start}_{o}"
            n = self.program.add_variable(f"n_{name}", 0, run.length, "Integer")
            y = self.program.add_variable(f"y_{name}", 0, 1, "Binary")
            self.program += n <= run.length * y
            for line in run.lines:
                if line.key[0] == "backward" or not self.is_bound:
                    self._write_block(run, line, o, n, y, place)
            pairs.append((o, n))
            self.seconds.append((options[o].recompute_seconds, n))
            place = self._after_block(run, o, n, y, place)
        self.program += _compat.total(n for _, n in pairs) == run.length
        self.blocks.append((run, pairs))
        self._pass(run.start, run.stop, [options[o].stored_bytes / self.unit * n for o, n in pairs])
        for t, held in place.held.items():
            self.held[t, run.stop] = held

    def _write_block(self, run: Run, line: Line, o: int, n: Any, y: Any, place: _Place) -> None:
        """Rows of the first and the last region of a block."""
        options = self.problem.regions[run.start].options
        kind, present = line.key
        own = _own_bytes(options[o], kind) / self.unit
        shared = []
        for t in present:
            size = self.problem.shared[t].size_bytes / self.unit
            if (run.start, o) in self.problem.shared[t].holders:
                own += size
            elif not self.is_bound:
                shared.append(size * place.held[t])
        stored, step = options[o].stored_bytes / self.unit, line.step_bytes / self.unit
        room = self._room(options, line)
        first = place.stored + step * place.count + _compat.total(shared)
        base = line.base_bytes
        self.rows.append((first + (own + room) * y - room, base))
        if stored + step > 0:  # else the first region's row is the higher one
            further = (stored + step) * n - (stored + step) * y
            self.rows.append((first + further + (own + room) * y - room, base))

    def _room(self, options: tuple[Option, ...], line: Line) -> float:
        """How far above its limit an empty block's row may come, less what the block adds."""
        step = line.step_bytes / self.unit
        own = [_own_bytes(option, line.key[0]) / self.unit for option in options]
        stored = [option.stored_bytes / self.unit for option in options]
        before = -min(own)
        behind = step + max(s - b for s, b in zip(stored, own, strict=True))
        return max(before, behind)

    def _after_block(self, run: Run, o: int, n: Any, y: Any, place: _Place) -> _Place:
        stored = self.problem.regions[run.start].options[o].stored_bytes / self.unit
        held = dict(place.held)
        for t in held:
            if (run.start, o) in self.problem.shared[t].holders:
                held[t] = self._either(held[t], 1 * y, f"held_{t}_{run.start}_{o}")
        return _Place(place.stored + stored * n, place.count + 1 * n, held)

    def _order(self, run: Run) -> list[int]:
        """Options by the rule of the docstring."""
        options = self.problem.regions[run.start].options
        backward = next((x for x in run.lines if x.key[0] == "backward"), run.lines[0])

        def rank(o: int) -> tuple[bool, int]:
            net = options[o].stored_bytes + backward.step_bytes
            peak = options[o].backward_bytes + sum(
                self.problem.shared[t].size_bytes
                for t in backward.key[1]
                if (run.start, o) in self.problem.shared[t].holders
            )
            return (False, peak) if net < 0 else (True, net - peak)

        return sorted(range(len(options)), key=rank)

    # -- parts -----------------------------------------------------------------------------------

    def _tensors(self) -> range:
        return range(len(self.problem.shared))

    def _variable(self, name: str, highest: float | None) -> Any:
        return self.program.add_variable(name, 0, highest)

    def _pass(self, start: int, stop: int, stored: list[Any]) -> None:
        """Bytes stored by the regions before ``stop``."""
        self.stored[stop] = prefix = self._variable(f"stored_{stop}", None)
        self.program += prefix == self.stored[start] + _compat.total(stored)

    def _either(self, one: Any, other: Any, name: str) -> Any:
        """At least the larger of two; it stands in rows with an upper limit, which keep it down."""
        either = self._variable(name, 1)
        self.program += either >= 1 * one
        self.program += either >= other
        return either

    def _read(self) -> tuple[int, ...]:
        choices: list[int] = []
        for run, pairs in self.blocks:
            if run.lines:
                for o, n in pairs:
                    choices += [o] * round(n.value())
            else:
                choices.append(max(pairs, key=lambda pair: pair[1].value())[0])
        return tuple(choices)


def _own_bytes(option: Option, kind: Phase | Literal["after"]) -> int:
    """What a region adds to what is stored before it; ``after`` its forward, what it stores."""
    return option.stored_bytes if kind == "after" else option.work_bytes(kind)
