"""Solvers: numbers in, decisions out.

A :class:`Problem` says what each region of a training step may do and what that takes; a solver
answers with a :class:`Solution`. One algorithm a file, all of one signature, the baselines as
equals; ``SOLVERS`` has them by name, each checked on the way in and out. The package depends on
PuLP and the standard library, never on torch, and imports PuLP only when a program is solved.
"""

from functools import partial

from memfit.solvers import auto, baselines, brute_force, count_ilp, flat_ilp, greedy, nested_dp
from memfit.solvers._compat import NoSolver, try_backends
from memfit.solvers.auto import minimise_peak
from memfit.solvers.check import ProblemError, SolverBug, checked, validate, verify
from memfit.solvers.nearby import nearby_seconds
from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Moment,
    Option,
    Phase,
    Problem,
    Region,
    Segment,
    SharedTensor,
    Solution,
    Solver,
    Status,
    chosen_segments,
    loads,
    peak_bytes,
    recompute_seconds,
)
from memfit.solvers.problem_file import load_problem, save_problem, solution_to_json

AUTO = auto.NAME
_FLAT: dict[str, Solver] = {
    count_ilp.NAME: count_ilp.solve,
    flat_ilp.NAME: flat_ilp.solve,
    greedy.NAME: greedy.solve,
}
_FLAT_BASELINES: dict[str, Solver] = {
    "none": baselines.none,
    "full": baselines.full,
    **{f"every_{n}": partial(baselines.every_n, n=n) for n in (2, 3, 4)},
    "keep_attention": baselines.keep_attention,
}
_NESTED: dict[str, Solver] = {
    nested_dp.NAME: nested_dp.solve,
    "brute_force": brute_force.solve,
    "sqrt_n": baselines.sqrt_n,
}


def _without_segments(solve: Solver) -> Solver:
    def run(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
        return solve(problem.flat(), limits)

    return run


_flat = {name: _without_segments(solve) for name, solve in (_FLAT | _FLAT_BASELINES).items()}
SOLVERS: dict[str, Solver] = {
    name: checked(solve) for name, solve in ({AUTO: auto.solve} | _flat | _NESTED).items()
}
"""By name. A solution is signed with it, that of ``auto`` with the name of what it picked."""
BASELINES = (*_FLAT_BASELINES, "sqrt_n")
"""Those that make one choice whatever the budget."""
NESTED = tuple(_NESTED)
"""Those that choose segments wherever they help; ``auto`` does so too, where there are any."""

__all__ = [
    "AUTO",
    "BASELINES",
    "DEFAULT_LIMITS",
    "NESTED",
    "SOLVERS",
    "Limits",
    "Moment",
    "NoSolver",
    "Option",
    "Phase",
    "Problem",
    "ProblemError",
    "Region",
    "Segment",
    "SharedTensor",
    "Solution",
    "Solver",
    "SolverBug",
    "Status",
    "chosen_segments",
    "load_problem",
    "loads",
    "minimise_peak",
    "nearby_seconds",
    "peak_bytes",
    "recompute_seconds",
    "save_problem",
    "solution_to_json",
    "try_backends",
    "validate",
    "verify",
]
