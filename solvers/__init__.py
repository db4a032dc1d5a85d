"""Solvers: numbers in, decisions out.

A :class:`Problem` says what each region of a training step may do and what that takes; a solver
answers with a :class:`Solution`. One algorithm a file, all of one signature, the baselines as
equals; ``SOLVERS`` has them by name, each checked on the way in and out. The package depends on
PuLP and the standard library, never on torch, and imports PuLP only when a program is solved.
"""

from functools import partial

from memfit.solvers import auto, baselines, brute_force, count_ilp, flat_ilp, greedy
from memfit.solvers._compat import NoSolver
from memfit.solvers.auto import minimise_peak
from memfit.solvers.check import ProblemError, SolverBug, checked, validate, verify
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
    Solver,
    Status,
    loads,
    peak_bytes,
    recompute_seconds,
)
from memfit.solvers.problem_file import load_problem, save_problem, solution_to_json

_BASELINES: dict[str, Solver] = {
    "none": baselines.none,
    "full": baselines.full,
    **{f"every_{n}": partial(baselines.every_n, n=n) for n in (2, 3, 4)},
    "keep_attention": baselines.keep_attention,
}
_SOLVERS: dict[str, Solver] = {
    auto.NAME: auto.solve,
    count_ilp.NAME: count_ilp.solve,
    flat_ilp.NAME: flat_ilp.solve,
    greedy.NAME: greedy.solve,
    "brute_force": brute_force.solve,
}
BASELINES = tuple(_BASELINES)
"""Those that make one choice whatever the budget."""
SOLVERS: dict[str, Solver] = {
    name: checked(solve) for name, solve in (_SOLVERS | _BASELINES).items()
}
"""By name. A solution is signed with it, that of ``auto`` with the name of what it picked."""

__all__ = [
    "BASELINES",
    "DEFAULT_LIMITS",
    "SOLVERS",
    "Limits",
    "Moment",
    "NoSolver",
    "Option",
    "Phase",
    "Problem",
    "ProblemError",
    "Region",
    "SharedTensor",
    "Solution",
    "Solver",
    "SolverBug",
    "Status",
    "load_problem",
    "loads",
    "minimise_peak",
    "peak_bytes",
    "recompute_seconds",
    "save_problem",
    "solution_to_json",
    "validate",
    "verify",
]
