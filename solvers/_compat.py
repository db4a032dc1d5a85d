"""PuLP 3 and PuLP 4 behind :func:`program`, :func:`total` and :func:`minimise`.

The formulations in this package use only what both majors share: ``program.add_variable(name, lb,
ub, cat)``, ``program += ...``, ``lpSum`` and ``variable.value()``. How a solve ended is where they
part, so it is read here, once, and handed on as plain data. Depends on PuLP, imported at the first
solve because it takes a quarter of a second. Each workaround names the upstream fact that ends it.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from memfit.solvers.problem import Status


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one program ended."""

    status: Status
    objective: float = 0.0
    """Of the values that the variables now have; means nothing without them."""
    bound: float = 0.0
    """No values give a smaller objective; means nothing when infeasible."""


class NoSolver(RuntimeError):
    """PuLP has no solver here."""


def pulp() -> Any:
    """The PuLP module. Any, because the annotations of the two majors differ.

    Ends when Python 3.11, the last that gets PuLP 3, is no longer supported.
    """
    return import_module("pulp")


def program(name: str) -> Any:
    """An empty minimisation."""
    return pulp().LpProblem(name, pulp().LpMinimize)


def total(terms: Iterable[Any]) -> Any:
    """The sum of expressions."""
    return pulp().lpSum(terms)


def backend() -> str:
    """The solver that :func:`minimise` uses: ``HiGHS`` or, failing that, ``CBC``."""
    library = pulp()
    if library.HiGHS(msg=False).available():
        return "HiGHS"
    # Ends with PuLP 3, the last to bundle CBC; PuLP 4 has no PULP_CBC_CMD.
    if hasattr(library, "PULP_CBC_CMD") and _bundled_cbc().available():
        return "CBC"
    raise NoSolver('PuLP finds no solver; install one with: pip install "pulp[highs]"')


def minimise(program: Any, gap: float, seconds: float, gap_absolute: float = 0.0) -> Outcome:
    """Solve ``program`` on one thread to either gap, for ``seconds`` at most.

    ``gap`` is a share of the objective, ``gap_absolute`` is in its unit.
    """
    if backend() == "HiGHS":
        return _minimise_with_highs(program, gap, seconds, gap_absolute)
    return _minimise_with_cbc(program, gap, seconds, gap_absolute)


def _minimise_with_highs(program: Any, gap: float, seconds: float, gap_absolute: float) -> Outcome:
    # HiGHS shares one pool of threads in a process and fails a run that asks for another number of
    # threads than the first did. `parallel` stays on one thread whatever the pool. Ends when HiGHS
    # has a pool for each instance (it then drops resetGlobalScheduler).
    # `output_flag`, because PuLP 4 turns only `log_to_console` off for msg=False.
    solver = pulp().HiGHS(
        msg=False,
        gapRel=gap,
        gapAbs=gap_absolute,
        timeLimit=seconds,
        parallel="off",
        output_flag=False,
    )
    program.solve(solver)
    # PuLP 3 returns an int, PuLP 4 LpSolveStats, and only that has the bound; HiGHS says the same
    # under both. Ends with PuLP 3.
    model = program.solverModel
    ended, info = model.getModelStatus().name, model.getInfo()
    if ended in ("kInfeasible", "kUnboundedOrInfeasible"):
        return Outcome(Status.INFEASIBLE)
    found = info.primal_solution_status == 2  # kSolutionStatusFeasible
    objective, bound = float(info.objective_function_value), float(info.mip_dual_bound)
    if ended == "kOptimal":
        return Outcome(Status.OPTIMAL, objective, bound)
    return Outcome(Status.FEASIBLE if found else Status.UNSOLVED, objective, bound)


def _minimise_with_cbc(program: Any, gap: float, seconds: float, gap_absolute: float) -> Outcome:
    solver = _bundled_cbc(gapRel=gap, gapAbs=gap_absolute, timeLimit=seconds, threads=1)
    program.solve(solver)
    if program.status == -1:
        return Outcome(Status.INFEASIBLE)
    if program.sol_status not in (1, 2):
        return Outcome(Status.UNSOLVED, bound=float("-inf"))
    objective = float(pulp().value(program.objective))
    if program.sol_status == 1:  # PuLP does not read the bound; the gaps imply one
        slack = max(gap * abs(objective), gap_absolute)
        return Outcome(Status.OPTIMAL, objective, objective - slack)
    return Outcome(Status.FEASIBLE, objective, float("-inf"))


def _bundled_cbc(**options: Any) -> Any:
    with warnings.catch_warnings():  # PuLP 3.3 announces on every use that it ends with PuLP 4
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp().PULP_CBC_CMD(msg=False, **options)
