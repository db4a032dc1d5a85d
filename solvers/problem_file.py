"""Problems and solutions as JSON, so that one from a real model can be solved alone and kept.

Options stand once for each kind of region, not once for each region. Depends on the records.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from memfit.solvers.check import ProblemError, validate
from memfit.solvers.problem import (
    Moment,
    Option,
    Problem,
    Region,
    Segment,
    SharedTensor,
    Solution,
    Status,
)
from memfit.solvers.records import RecordError, decode, encode, read, write

SCHEMA = "memfit.problem/1"
SOLUTION_SCHEMA = "memfit.solution/1"
_AGAIN = "write it again, with `memfit plan ... --save-problem FILE` or `memfit solve`"


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    kind: int


@dataclass(frozen=True, slots=True)
class _File:
    budget_bytes: int
    kinds: tuple[tuple[Option, ...], ...]
    regions: tuple[_Place, ...]
    moments: tuple[Moment, ...]
    shared: tuple[SharedTensor, ...] = ()
    segments: tuple[Segment, ...] = ()


def to_json(problem: Problem) -> str:
    """The problem as JSON, ending in a newline; kinds are numbered from 0."""
    validate(problem)
    numbers: dict[int, int] = {}
    for region in problem.regions:
        numbers.setdefault(region.kind, len(numbers))
    options = {numbers[region.kind]: region.options for region in problem.regions}
    file = _File(
        problem.budget_bytes,
        tuple(options[number] for number in range(len(options))),
        tuple(_Place(region.name, numbers[region.kind]) for region in problem.regions),
        problem.moments,
        problem.shared,
        problem.segments,
    )
    return json.dumps({"schema": SCHEMA} | encode(file), indent=1) + "\n"


def from_json(text: str, source: str = "the text") -> Problem:
    """Inverse of :func:`to_json`; ``source`` names the text in a :class:`ProblemError`."""
    file: _File = _read(text, source, "problem", SCHEMA, _File)
    for index, place in enumerate(file.regions):
        if not 0 <= place.kind < len(file.kinds):
            raise ProblemError(
                f"{source} is not a problem: $.regions[{index}].kind is {place.kind}, there are "
                f"{len(file.kinds)} kinds; {_AGAIN}"
            )
    regions = tuple(Region(p.name, file.kinds[p.kind], p.kind) for p in file.regions)
    problem = Problem(regions, file.moments, file.budget_bytes, file.shared, file.segments)
    try:
        validate(problem)
    except ProblemError as error:
        raise ProblemError(f"{source} is not a problem: {error}; {_AGAIN}") from error
    return problem


def save_problem(problem: Problem, path: str | Path) -> None:
    """Writes a problem; a file that is there is replaced in one step."""
    write(path, to_json(problem))


def load_problem(path: str | Path, budget_bytes: int | None = None) -> Problem:
    """Reads a problem, for another budget if one is given; :class:`ProblemError` if it is none."""
    try:
        text = read(path)
    except RecordError as error:
        raise ProblemError(str(error)) from error
    problem = from_json(text, str(path))
    return problem if budget_bytes is None else replace(problem, budget_bytes=budget_bytes)


@dataclass(frozen=True, slots=True)
class _Chosen:
    name: str
    choice: int
    action: str
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _SolutionFile:
    """A solution as people read it: its regions by name, its status with what to do about it."""

    solver: str
    status: str
    remedy: str
    budget_bytes: int
    peak_bytes: int
    recompute_seconds: float
    bound_seconds: float
    gap: float
    solve_seconds: float
    variables: int
    rows: int
    note: str
    regions: tuple[_Chosen, ...]


def solution_to_json(problem: Problem, solution: Solution) -> str:
    """The solution as JSON, ending in a newline; without a choice there are no regions."""
    chosen = zip(problem.regions, solution.choices, strict=False)
    file = _SolutionFile(
        **{
            field.name: getattr(solution, field.name)
            for field in fields(solution)
            if field.name not in ("choices", "status")
        },
        status=solution.status.value,
        remedy=solution.status.remedy,
        budget_bytes=problem.budget_bytes,
        regions=tuple(
            _Chosen(r.name, c, r.options[c].action, r.options[c].keep) for r, c in chosen
        ),
    )
    return json.dumps({"schema": SOLUTION_SCHEMA} | encode(file), indent=1) + "\n"


def solution_from_json(text: str, source: str = "the text") -> Solution:
    """Inverse of :func:`solution_to_json`; ``source`` names the text in a :class:`ProblemError`."""
    file: _SolutionFile = _read(text, source, "solution", SOLUTION_SCHEMA, _SolutionFile)
    if file.status not in [status.value for status in Status]:
        raise ProblemError(f"{source} is not a solution: $.status is {file.status!r}")
    return Solution(
        choices=tuple(region.choice for region in file.regions),
        status=Status(file.status),
        **{
            field.name: getattr(file, field.name)
            for field in fields(Solution)
            if field.name not in ("choices", "status")
        },
    )


def _read(text: str, source: str, what: str, schema: str, kind: type[Any]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"{source} is not a {what}: {error}; {_AGAIN}") from error
    found = value.pop("schema", None) if isinstance(value, dict) else None
    if found != schema:
        raise ProblemError(f"{source} has schema {found!r}, this memfit reads {schema!r}; {_AGAIN}")
    try:
        return decode(kind, value)
    except RecordError as error:
        raise ProblemError(f"{source} is not a {what}: {error}; {_AGAIN}") from error
