"""Puts a choice in order: of identical regions, those that recompute most come first.

Solvers break ties among interchangeable regions at random. Early regions hold what they store for
longest, so recomputing there is never worse in a chain, and a plan with few changes of action is
easier to read. Depends on the standard library only.
"""

from collections import defaultdict
from collections.abc import Sequence

from memfit.solvers.problem import Problem, peak_bytes


def in_order(problem: Problem, choices: Sequence[int]) -> tuple[int, ...]:
    """The same options of each kind of region in order, if the peak does not rise by it."""
    by_kind: dict[int, list[int]] = defaultdict(list)
    for r, region in enumerate(problem.regions):
        by_kind[region.kind].append(r)
    best, peak = tuple(choices), peak_bytes(problem, choices)
    for members in by_kind.values():
        options = problem.regions[members[0]].options
        wanted = sorted((best[r] for r in members), key=lambda o: -options[o].recompute_seconds)
        candidate = list(best)
        for r, choice in zip(members, wanted, strict=True):
            candidate[r] = choice
        if peak_bytes(problem, candidate) <= peak:
            best = tuple(candidate)
    return best
