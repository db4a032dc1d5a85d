"""Solvers: numbers in, decisions out.

A :class:`Problem` says what each region of a training step may do and what that takes; a solver
answers with a :class:`Solution`. One algorithm a file, all of one signature, the baselines as
equals; ``SOLVERS`` has them by name. The package depends on PuLP and the standard library, never on
torch, and imports PuLP only when a program is solved.
"""

from functools import partial
from typing import Protocol

from memfit.solvers import baselines, brute_force, flat_ilp
from memfit.solvers.flat_ilp import minimise_peak
from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Moment,
    Option,
    Phase,
    Problem,
    Region,
    SharedTensor,
    Solution,
    Status,
    loads,
    peak_bytes,
    recompute_seconds,
)


class Solver(Protocol):
    """What all solvers look like; those that need no limits take them all the same."""

    def __call__(self, problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution: ...


SOLVERS: dict[str, Solver] = {
    "ilp": flat_ilp.solve,
    "brute_force": brute_force.solve,
    "none": baselines.none,
    "full": baselines.full,
    **{f"every_{n}": partial(baselines.every_n, n=n) for n in (2, 3, 4)},
}
"""By the name that a solver signs its solutions with."""

__all__ = [
    "DEFAULT_LIMITS",
    "SOLVERS",
    "Limits",
    "Moment",
    "Option",
    "Phase",
    "Problem",
    "Region",
    "SharedTensor",
    "Solution",
    "Solver",
    "Status",
    "loads",
    "minimise_peak",
    "peak_bytes",
    "recompute_seconds",
]
