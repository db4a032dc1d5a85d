"""The planning problem and its solution, as plain numbers.

A training step runs its regions forward in order and backward in reverse order. Each region offers
options; an option says how many bytes it stores between its forward and its backward, how many
bytes its own forward and backward need at their worst, and how many seconds of recomputation it
costs. Choosing one option per region fixes the bytes alive at every moment of the step:

    bytes(moment) = base_bytes
                  + stored_bytes of the regions before ``moment.stored``
                  + forward_bytes or backward_bytes of ``moment.region``
                  + size_bytes of the shared tensors that a chosen option keeps alive
                  + held bytes of the segments that are chosen

A choice is feasible when no moment exceeds the budget. Of two feasible choices the better one
recomputes for fewer seconds or, at the same seconds (:func:`seconds_ceiling`), has the lower peak.

This module depends on nothing but the standard library; the solvers in this package read a
:class:`Problem` and return a :class:`Solution`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, Protocol

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a region."""

    action: str
    """``keep``, ``checkpoint`` or ``selective``."""
    stored_bytes: int
    """Held from the end of the region's forward to the start of its backward."""
    forward_bytes: int
    """Most that the region's forward holds at once above its moment's base."""
    backward_bytes: int
    """The same of its backward, stored bytes included."""
    recompute_seconds: float
    keep: tuple[str, ...] = ()
    """Names of the tensors that are kept, for ``selective``."""
    chained: bool = False
    """Whether its input is made again by the region before it, which takes a :class:`Segment`."""

    def work_bytes(self, phase: Phase) -> int:
        """What its own forward or backward adds to a moment."""
        return self.forward_bytes if phase == "forward" else self.backward_bytes


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the model that is planned as one.

    Its options are in the planner's order, those that are chained last.
    """

    name: str
    options: tuple[Option, ...]
    kind: int
    """Regions of equal kind are identical: same options, interchangeable but for their place."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A stretch of the step that is budgeted by one row."""

    name: str
    base_bytes: int
    """Alive whatever is chosen: resident bytes, gradients so far, tensors in flight."""
    stored: int
    """Regions ``0 .. stored-1`` hold their stored bytes."""
    region: int | None = None
    """The region at work, whose option adds its ``forward_bytes`` or ``backward_bytes``."""
    phase: Phase = "forward"

    @property
    def place(self) -> int:
        """The region before which, or at whose work, all that is counted is known."""
        return self.stored if self.region is None else max(self.stored, self.region)


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A tensor that options of several regions may keep alive; it counts once.

    At each of ``moments`` it is alive if a chosen ``(region, option)`` of ``holders`` belongs to a
    region before ``moment.stored`` or to ``moment.region`` itself.
    """

    name: str
    size_bytes: int
    holders: tuple[tuple[int, int], ...]
    moments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring regions of which only the first holds its input.

    When the backward comes to the last one, those before it run again and give each its input,
    which is then held until the region's own backward. It is chosen when the regions from
    ``first`` run the options ``choices``, and the region after them none that is chained.
    """

    first: int
    choices: tuple[int, ...]
    """An option for each of its regions: the first not chained, the others all."""
    recompute_seconds: float
    """Of running the regions again for their results, beside what the options take."""
    held: tuple[tuple[int, int], ...] = ()
    """Moments, each with the bytes that are alive there beside what the options say; their
    :attr:`Moment.place` is one of the segment's regions."""

    @property
    def stop(self) -> int:
        """The region after the last."""
        return self.first + len(self.choices)


@dataclass(frozen=True, slots=True)
class Problem:
    """What to choose and what limits the choice. Regions are in forward order."""

    regions: tuple[Region, ...]
    moments: tuple[Moment, ...]
    budget_bytes: int
    shared: tuple[SharedTensor, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def unavoidable_bytes(self) -> int:
        """Most bytes alive at once whatever is chosen: no smaller budget has a choice."""
        return max((moment.base_bytes for moment in self.moments), default=0)

    def flat(self) -> "Problem":
        """The problem without segments: every region holds its input."""
        counts = [sum(not option.chained for option in r.options) for r in self.regions]
        if not self.segments and counts == [len(r.options) for r in self.regions]:
            return self
        return self.first_options(counts)

    def first_options(self, counts: Sequence[int]) -> "Problem":
        """The problem in which regions have so many of their options, and no segments."""
        regions = tuple(
            replace(region, options=region.options[:count])
            for region, count in zip(self.regions, counts, strict=True)
        )
        shared = tuple(
            replace(t, holders=tuple((r, o) for r, o in t.holders if o < counts[r]))
            for t in self.shared
        )
        return replace(self, regions=regions, shared=shared, segments=())


class Status(Enum):
    """How a solve ended; :attr:`remedy` says what to do about it."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNSOLVED = "unsolved"

    @property
    def remedy(self) -> str:
        return {
            Status.OPTIMAL: "the choice is proved best within the stated gap",
            Status.FEASIBLE: "the choice fits but is not proved best; give auto more time",
            Status.INFEASIBLE: "nothing this solver may choose fits; raise the budget",
            Status.UNSOLVED: "the time limit ended the search without a choice; raise it",
        }[self]


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice of one option per region, with what the solver knows about it."""

    choices: tuple[int, ...]
    """Index of the chosen option for each region; empty when there is no choice."""
    status: Status
    recompute_seconds: float
    peak_bytes: int
    """Largest moment of the problem under this choice."""
    solver: str
    bound_seconds: float = 0.0
    """No choice within the budget recomputes for less than this."""
    gap: float = 0.0
    """``(recompute_seconds - bound_seconds) / recompute_seconds``; 0 when nothing is recomputed."""
    solve_seconds: float = 0.0
    variables: int = 0
    """Of the integer program, if there was one; with its rows the size of the model."""
    rows: int = 0
    note: str = ""
    """Why this solver was taken, where that was a choice, and what failed before it answered."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a solver may stop."""

    gap: float = 1e-4
    """Relative gap between the choice and the bound at which the search ends."""
    seconds: float = 20.0
    gap_seconds: float = 0.0
    """Seconds of recomputation between the two at which it ends as well."""
    lowest_peak: bool = True
    """Whether it looks for the lowest peak at the same seconds, which takes twice as long again."""


DEFAULT_LIMITS = Limits()


class Solver(Protocol):
    """What all solvers look like; those that need no limits take them all the same."""

    def __call__(self, problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution: ...


def loads(problem: Problem, choices: Sequence[int]) -> tuple[int, ...]:
    """Bytes alive at each moment of ``problem`` when region ``r`` runs ``options[choices[r]]``."""
    chosen = [region.options[c] for region, c in zip(problem.regions, choices, strict=True)]
    prefix = [0]
    for option in chosen:
        prefix.append(prefix[-1] + option.stored_bytes)
    alive = [moment.base_bytes + prefix[moment.stored] for moment in problem.moments]
    for index, moment in enumerate(problem.moments):
        if moment.region is not None:
            alive[index] += chosen[moment.region].work_bytes(moment.phase)
    for tensor in problem.shared:
        holders = {r for r, o in tensor.holders if choices[r] == o}
        first = min(holders, default=len(chosen))
        for index in tensor.moments:
            moment = problem.moments[index]
            if first < moment.stored or moment.region in holders:
                alive[index] += tensor.size_bytes
    for segment in chosen_segments(problem, choices):
        for index, held_bytes in segment.held:
            alive[index] += held_bytes
    return tuple(alive)


def chosen_segments(problem: Problem, choices: Sequence[int]) -> tuple[Segment, ...]:
    """The segments that a choice is made of, beside single regions."""
    return tuple(
        segment
        for segment in problem.segments
        if tuple(choices[segment.first : segment.stop]) == segment.choices
        and not is_chained(problem, choices, segment.stop)
    )


def is_chained(problem: Problem, choices: Sequence[int], region: int) -> bool:
    """Whether a region is there and runs a chained option."""
    regions = problem.regions
    return region < len(regions) and regions[region].options[choices[region]].chained


def is_whole(problem: Problem, choices: Sequence[int]) -> bool:
    """Whether every chained option is part of a segment, as it must be."""
    chained = sum(is_chained(problem, choices, r) for r in range(len(problem.regions)))
    if not chained:
        return True
    return chained == sum(len(s.choices) - 1 for s in chosen_segments(problem, choices))


def peak_bytes(problem: Problem, choices: Sequence[int]) -> int:
    """Largest of :func:`loads`; 0 for a problem without moments."""
    return max(loads(problem, choices), default=0)


def recompute_seconds(problem: Problem, choices: Sequence[int]) -> float:
    """Seconds of recomputation that a choice costs in one step."""
    seconds = sum(
        region.options[c].recompute_seconds
        for region, c in zip(problem.regions, choices, strict=True)
    )
    return seconds + sum(s.recompute_seconds for s in chosen_segments(problem, choices))


def seconds_ceiling(seconds: float) -> float:
    """Most seconds that count as the same as ``seconds``: sums of floats depend on their order."""
    return seconds * (1 + 1e-9) + 1e-12


def describe(
    problem: Problem,
    choices: Sequence[int],
    status: Status,
    solver: str,
    *,
    bound_seconds: float = 0.0,
    solve_seconds: float = 0.0,
) -> Solution:
    """The solution that ``choices`` make: its seconds, peak and gap are those of ``problem``."""
    seconds = recompute_seconds(problem, choices)
    bound = min(max(bound_seconds, 0.0), seconds)
    return Solution(
        choices=tuple(choices),
        status=status,
        recompute_seconds=seconds,
        peak_bytes=peak_bytes(problem, choices),
        solver=solver,
        bound_seconds=bound,
        gap=(seconds - bound) / seconds if seconds > 0 else 0.0,
        solve_seconds=solve_seconds,
    )
