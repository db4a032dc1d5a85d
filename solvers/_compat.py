"""PuLP 3 and PuLP 4 behind :func:`program`, :func:`total` and :func:`minimise`.

The formulations in this package use only what both majors share: ``program.add_variable(name, lb,
ub, cat)``, ``program += ...``, ``lpSum`` and ``variable.value()``. How a solve ended is where they
part, so it is read here, once, and handed on as plain data. Depends on PuLP, imported at the first
solve because it takes a quarter of a second. Each workaround names the upstream fact that ends it.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
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
    variables: int = 0
    rows: int = 0
    note: str = ""
    """Which solvers failed before this one answered, if any did."""


class NoSolver(RuntimeError):
    """PuLP has no solver here."""


@functools.cache
def pulp() -> Any:
    """The PuLP module. Any, because the annotations of the two majors differ.

    That ends when Python 3.11, the last that gets PuLP 3, is no longer supported. It is imported in
    a thread: PuLP keeps the errors of importing the solvers that are not there, and with each the
    frames below it, which in the caller's thread hold the model and its optimizer for ever. Ends
    when no module of ``pulp.apis`` keeps an exception.
    """
    with ThreadPoolExecutor(max_workers=1) as elsewhere:
        return elsewhere.submit(import_module, "pulp").result()


def program(name: str) -> Any:
    """An empty minimisation."""
    return pulp().LpProblem(name, pulp().LpMinimize)


def total(terms: Iterable[Any]) -> Any:
    """The sum of expressions."""
    return pulp().lpSum(terms)


@functools.cache
def _greet_highs() -> None:
    """Has HiGHS 1.16 print its banner, which it does once in a process, where nobody reads it.

    Ends when constructing ``Highs()`` prints nothing again.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            import_module("highspy").Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@functools.cache
def _presolve() -> dict[str, str]:
    """Before 1.16, HiGHS's presolve loses optima of mixed programs (its issues 3043 and 3094).

    Ends when PuLP asks for 1.16; its 3.3 asks for 1.13.
    """
    major, minor = version("highspy").split(".")[:2]
    return {} if (int(major), int(minor)) >= (1, 16) else {"presolve": "off"}


def minimise(program: Any, gap: float, seconds: float, gap_absolute: float = 0.0) -> Outcome:
    """Solve ``program`` on one thread to either gap, for ``seconds`` at most.

    ``gap`` is a share of the objective, ``gap_absolute`` is in its unit. A solver that fails is
    named in the outcome's note, and the next one is tried; :class:`NoSolver` after the last.
    """
    failures = []
    for name, solve in _backends():
        try:
            outcome = solve(program, gap, seconds, gap_absolute)
        except Exception as error:  # solvers fail in ways of their own
            failures.append(f"{name} failed: {error}")
        else:
            return replace(outcome, note="; ".join(failures))
    why = "; ".join(failures) or "PuLP finds no solver"
    raise NoSolver(f"{why}; install one with: pip install highspy")


def try_backends() -> list[tuple[str, str]]:
    """The solvers that are here, each with why it fails at one variable, or an empty text."""
    found = []
    for name, solve in _backends():
        least = program("least")
        x = least.add_variable("x", 0, None, "Integer")
        least += 1 * x
        least += 1 * x >= 0.5
        problem = ""
        try:
            outcome = solve(least, 0.0, 10.0, 0.0)
            if (outcome.status, outcome.objective) != (Status.OPTIMAL, 1.0):
                problem = f"it answers {outcome.status.value}, {outcome.objective}"
        except Exception as error:  # solvers fail in ways of their own
            problem = " ".join(str(error).split())
        found.append((name, problem))
    return found


def _backends() -> Iterator[tuple[str, Callable[[Any, float, float, float], Outcome]]]:
    library = pulp()
    if library.HiGHS(msg=False).available():
        _greet_highs()
        yield "HiGHS", _minimise_with_highs
    # Ends with PuLP 3, the last to bundle CBC; PuLP 4 has no PULP_CBC_CMD.
    if hasattr(library, "PULP_CBC_CMD") and _bundled_cbc().available():
        yield "CBC", _minimise_with_cbc


def _minimise_with_highs(program: Any, gap: float, seconds: float, gap_absolute: float) -> Outcome:
    # HiGHS shares one pool of threads in a process and fails a run that asks for another number of
    # threads than the first did. `parallel` stays on one thread whatever the pool. Ends when HiGHS
    # has a pool for each instance (it then drops resetGlobalScheduler).
    # `output_flag`, because PuLP 4 turns only `log_to_console` off for msg=False.
    # The programs here are small: the feasibility jump takes longer than all the rest, and what
    # it finds is worse than rounding ("shifting") the relaxation.
    solver = pulp().HiGHS(
        msg=False,
        gapRel=gap,
        gapAbs=gap_absolute,
        timeLimit=seconds,
        parallel="off",
        output_flag=False,
        mip_heuristic_run_shifting=True,
        mip_heuristic_run_feasibility_jump=False,
        **_presolve(),
    )
    program.solve(solver)
    # PuLP 3 returns an int, PuLP 4 LpSolveStats, and only that has the bound; HiGHS says the same
    # under both. Ends with PuLP 3.
    model = program.solverModel
    ended, info = model.getModelStatus().name, model.getInfo()
    if ended.endswith("Error") or ended in ("kNotset", "kUnknown", "kMemoryLimit"):
        raise RuntimeError(f"it ended with {ended}")
    size = model.getNumCol(), model.getNumRow()
    if ended in ("kInfeasible", "kUnboundedOrInfeasible"):
        return Outcome(Status.INFEASIBLE, 0.0, 0.0, *size)
    found = info.primal_solution_status == 2  # kSolutionStatusFeasible
    objective, bound = float(info.objective_function_value), float(info.mip_dual_bound)
    if ended == "kOptimal":
        return Outcome(Status.OPTIMAL, objective, bound, *size)
    return Outcome(Status.FEASIBLE if found else Status.UNSOLVED, objective, bound, *size)


def _minimise_with_cbc(program: Any, gap: float, seconds: float, gap_absolute: float) -> Outcome:
    solver = _bundled_cbc(gapRel=gap, gapAbs=gap_absolute, timeLimit=seconds, threads=1)
    program.solve(solver)
    size = program.numVariables(), program.numConstraints()
    if program.status == -1:
        return Outcome(Status.INFEASIBLE, 0.0, 0.0, *size)
    if program.sol_status not in (1, 2):
        return Outcome(Status.UNSOLVED, 0.0, float("-inf"), *size)
    objective = float(pulp().value(program.objective))
    if program.sol_status == 1:  # PuLP does not read the bound; the gaps imply one
        slack = max(gap * abs(objective), gap_absolute)
        return Outcome(Status.OPTIMAL, objective, objective - slack, *size)
    return Outcome(Status.FEASIBLE, objective, float("-inf"), *size)


def _bundled_cbc(**options: Any) -> Any:
    with warnings.catch_warnings():  # PuLP 3.3 announces on every use that it ends with PuLP 4
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp().PULP_CBC_CMD(msg=False, **options)
