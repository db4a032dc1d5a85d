"""What goes into a solver and what comes out of it, checked.

``validate`` refuses problems that mean nothing. ``verify`` replays a solution on its problem: it
walks the moments one after the other with a stack of stored regions and a reference count for each
shared tensor, which is another way to count than the prefixes of :mod:`memfit.solvers.problem` and
than the rows of the integer programs. ``checked`` puts both around a solver. Depends on the records
alone.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Moment,
    Option,
    Problem,
    Region,
    Segment,
    Solution,
    Solver,
    Status,
    seconds_ceiling,
)

MOST_BYTES = 10**15
"""Of one size: a petabyte. Solvers refuse coefficients beyond."""
MOST_SECONDS = 1e12


class ProblemError(ValueError):
    """A problem that means nothing, with the offending name."""


class SolverBug(RuntimeError):
    """A solution that is not what it says; please report it with the saved problem."""


def checked(solve: Solver) -> Solver:
    """``solve`` for problems that mean something, and only with answers that hold."""

    def run(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
        validate(problem)
        solution = solve(problem, limits)
        verify(problem, solution)
        return solution

    return run


def validate(problem: Problem) -> None:
    """Raises :class:`ProblemError` if a number is none, below zero or points nowhere."""
    budget = problem.budget_bytes
    if type(budget) is not int or abs(budget) > MOST_BYTES**2:
        raise ProblemError(f"the budget is {_short(budget)}, not a number of bytes")
    kinds: dict[int, Region] = {}
    for region in problem.regions:
        same = kinds.setdefault(region.kind, region)
        if same.options != region.options:
            raise ProblemError(
                f"regions {same.name} and {region.name} are of one kind, {region.kind}, but have "
                "different options"
            )
    for region in kinds.values():
        for number, option in enumerate(region.options):
            _validate_option(f"option {number} ({option.action}) of {region.name}", option)
    for moment in problem.moments:
        _validate_moment(moment, len(problem.regions))
    for tensor in problem.shared:
        _whole(f"size of {tensor.name}", tensor.size_bytes)
        for r, o in tensor.holders:
            _index(f"{tensor.name} is held by region", r, len(problem.regions))
            name = problem.regions[r].name
            _index(f"{tensor.name} is held by option of {name}", o, len(problem.regions[r].options))
        for index in tensor.moments:
            _index(f"{tensor.name} is in moment", index, len(problem.moments))
    for region in kinds.values():
        chained = [option.chained for option in region.options]
        if chained != sorted(chained):
            raise ProblemError(f"{region.name} has chained options before others")
    for number, segment in enumerate(problem.segments):
        _validate_segment(f"segment {number}", segment, problem)
    if len({(s.first, s.choices) for s in problem.segments}) < len(problem.segments):
        raise ProblemError("a segment is offered twice")


def _validate_segment(name: str, segment: Segment, problem: Problem) -> None:
    _index(f"{name} begins with region", segment.first, len(problem.regions))
    _index(f"{name} ends before region", segment.stop, len(problem.regions) + 1)
    if len(segment.choices) < 2:
        raise ProblemError(f"{name} has {len(segment.choices)} regions, not two or more")
    for r, o in enumerate(segment.choices, segment.first):
        region = problem.regions[r]
        _index(f"{name} has option of {region.name}", o, len(region.options))
        if region.options[o].chained is (r == segment.first):
            raise ProblemError(f"{name} takes chained options but for its first: {region.name}")
    _seconds(name, segment.recompute_seconds)
    for index, held_bytes in segment.held:
        _index(f"{name} holds in moment", index, len(problem.moments))
        _whole(f"held bytes of {name}", held_bytes)
        if not segment.first <= problem.moments[index].place < segment.stop:
            raise ProblemError(f"{name} holds in {problem.moments[index].name}, outside of it")
    if len({index for index, _ in segment.held}) < len(segment.held):
        raise ProblemError(f"{name} names a moment twice")


def _validate_option(name: str, option: Option) -> None:
    _whole(f"stored_bytes of {name}", option.stored_bytes)
    _whole(f"forward_bytes of {name}", option.forward_bytes)
    _whole(f"backward_bytes of {name}", option.backward_bytes)
    _seconds(name, option.recompute_seconds)


def _seconds(name: str, seconds: float) -> None:
    if type(seconds) not in (int, float) or not 0 <= seconds <= MOST_SECONDS:
        raise ProblemError(
            f"recompute_seconds of {name} is {_short(seconds)}, not a number from 0 to "
            f"{MOST_SECONDS:g}"
        )


def _validate_moment(moment: Moment, regions: int) -> None:
    _whole(f"base_bytes of {moment.name}", moment.base_bytes)
    _index(f"{moment.name} comes after the stored region", moment.stored, regions + 1)
    if moment.region is not None:
        _index(f"{moment.name} is the work of region", moment.region, regions)
    if moment.phase not in ("forward", "backward"):
        raise ProblemError(f"phase of {moment.name} is {moment.phase!r}, not forward or backward")


def _whole(name: str, size: int) -> None:
    if type(size) is not int or not 0 <= size <= MOST_BYTES:
        raise ProblemError(
            f"{name} is {_short(size)}, not a whole number of bytes from 0 to {MOST_BYTES}"
        )


def _short(value: object) -> str:
    """A number as it is, unless it goes on and on."""
    if isinstance(value, int) and abs(value) > MOST_BYTES**3:
        return "a number of very many digits"
    return repr(value)


def _index(name: str, index: int, count: int) -> None:
    if type(index) is not int or not 0 <= index < count:
        raise ProblemError(f"{name} {index!r}, of which there are {count}")


def verify(problem: Problem, solution: Solution) -> None:
    """Raises :class:`SolverBug` where the replay of a solution does not find what it states."""
    who = solution.solver
    if not solution.choices:
        if problem.regions and solution.status in (Status.OPTIMAL, Status.FEASIBLE):
            raise SolverBug(f"{who} calls its answer {solution.status.value} but gives none")
        return
    if len(solution.choices) != len(problem.regions):
        raise SolverBug(f"{who} chose for {len(solution.choices)} of {len(problem.regions)}")
    for region, choice in zip(problem.regions, solution.choices, strict=True):
        if not 0 <= choice < len(region.options):
            raise SolverBug(f"{who} chose option {choice} of {region.name}, which has no such one")
    options = [r.options[c] for r, c in zip(problem.regions, solution.choices, strict=True)]
    segments = _segments(problem, solution.choices, who)
    seconds = math.fsum(
        (*(o.recompute_seconds for o in options), *(s.recompute_seconds for s in segments))
    )
    if not abs(seconds - solution.recompute_seconds) <= seconds_ceiling(seconds) - seconds:
        raise SolverBug(f"{who} states {solution.recompute_seconds} s, its choice takes {seconds}")
    if not solution.bound_seconds <= seconds_ceiling(seconds):
        raise SolverBug(f"{who} states a bound of {solution.bound_seconds} s above its {seconds}")
    _verify_peak(problem, solution, options)


def _segments(problem: Problem, choices: Sequence[int], who: str) -> list[Segment]:
    """The segment of every chain of regions, each of which must be offered."""
    known = {(s.first, s.choices): s for s in problem.segments}
    chains: list[list[int]] = []
    for r, (region, choice) in enumerate(zip(problem.regions, choices, strict=True)):
        if not region.options[choice].chained:
            chains.append([r])
        elif not chains:
            raise SolverBug(f"{who} chains {region.name} to nothing")
        else:
            chains[-1].append(r)
    found = []
    for chain in chains:
        if len(chain) > 1:
            segment = known.get((chain[0], tuple(choices[r] for r in chain)))
            if segment is None:
                first, last = problem.regions[chain[0]].name, problem.regions[chain[-1]].name
                raise SolverBug(f"{who} chains {first} to {last}, which is no segment")
            found.append(segment)
    return found


def _verify_peak(problem: Problem, solution: Solution, options: list[Option]) -> None:
    who = solution.solver
    peak, at = max(replayed(problem, solution.choices), key=lambda x: x[0], default=(0, None))
    where = "" if at is None else f" in {at.name}"
    if at is not None and at.region is not None:
        where += f", where {problem.regions[at.region].name} runs option "
        where += f"{solution.choices[at.region]} ({options[at.region].action})"
    if peak != solution.peak_bytes:
        raise SolverBug(f"{who} states a peak of {solution.peak_bytes}, there are {peak}{where}")
    fits = peak <= problem.budget_bytes
    if fits is (solution.status is Status.INFEASIBLE):
        raise SolverBug(
            f"{who} calls {solution.status.value} what takes {peak} of {problem.budget_bytes} "
            f"bytes{where}"
        )


def replayed(problem: Problem, choices: tuple[int, ...]) -> Iterator[tuple[int, Moment]]:
    """Bytes alive at each moment, by reference counts."""
    again: Counter[int] = Counter()
    for segment in _segments(problem, choices, "the choice"):
        for index, held_bytes in segment.held:
            again[index] += held_bytes
    held: dict[int, list[int]] = defaultdict(list)
    for number, tensor in enumerate(problem.shared):
        for r, o in set(tensor.holders):
            if choices[r] == o:
                held[r].append(number)
    present: dict[int, set[int]] = defaultdict(set)
    for number, tensor in enumerate(problem.shared):
        for index in tensor.moments:
            present[index].add(number)
    count: Counter[int] = Counter()
    stack: list[int] = []
    stored = 0
    for index, moment in enumerate(problem.moments):
        while len(stack) < moment.stored:
            region = len(stack)
            stack.append(region)
            stored += problem.regions[region].options[choices[region]].stored_bytes
            count.update(held[region])
        while len(stack) > moment.stored:
            region = stack.pop()
            stored -= problem.regions[region].options[choices[region]].stored_bytes
            count.subtract(held[region])
        alive = {number for number in present[index] if count[number] > 0}
        total = moment.base_bytes + stored + again[index]
        if moment.region is not None:
            option = problem.regions[moment.region].options[choices[moment.region]]
            works = {"forward": option.forward_bytes, "backward": option.backward_bytes}
            total += works[moment.phase]
            alive.update(present[index].intersection(held[moment.region]))
        yield total + sum(problem.shared[number].size_bytes for number in alive), moment
