"""Segments: the nested program against every choice in turn, and the baseline of Chen."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from memfit.integrations import cli
from memfit.solvers import (
    SOLVERS,
    Moment,
    Option,
    Problem,
    ProblemError,
    Region,
    Segment,
    Status,
    brute_force,
    minimise_peak,
    nested_dp,
)
from memfit.solvers.problem_file import from_json, save_problem, to_json
from tests.problems import EXACT, nested, problems, runs

some = settings(max_examples=300, derandomize=True, deadline=None, database=None)


def is_regular(problem: Problem) -> bool:
    """Whether every moment at a region's work counts what is stored before that region."""
    return all(m.region in (None, m.stored) for m in problem.moments)


@some
@given(nested() | problems() | runs())
def test_the_program_finds_what_every_choice_in_turn_finds(problem: Problem) -> None:
    best = SOLVERS["brute_force"](problem)
    found = SOLVERS["nested_dp"](problem, EXACT)
    if is_regular(problem):
        assert found.status is best.status
        assert found.recompute_seconds == pytest.approx(best.recompute_seconds, abs=1e-9)
        assert found.peak_bytes == best.peak_bytes
    elif found.choices:
        assert found.recompute_seconds >= best.recompute_seconds - 1e-9
        assert found.peak_bytes <= problem.budget_bytes


@some
@given(nested())
def test_the_lowest_peak_is_that_of_every_choice_in_turn(problem: Problem) -> None:
    best, found = brute_force.minimise_peak(problem), minimise_peak(problem)
    if is_regular(problem):
        assert found.peak_bytes == best.peak_bytes
        assert found.recompute_seconds == pytest.approx(best.recompute_seconds, abs=1e-9)


@some
@given(nested())
def test_auto_takes_segments_where_they_are_better(problem: Problem) -> None:
    best, found = SOLVERS["brute_force"](problem), SOLVERS["auto"](problem, EXACT)
    flat = SOLVERS["flat_ilp"](problem, EXACT)
    if is_regular(problem):
        assert found.status is best.status
        assert found.recompute_seconds == pytest.approx(best.recompute_seconds, abs=1e-9)
    elif flat.choices:
        assert found.recompute_seconds <= flat.recompute_seconds + 1e-9


def deep(count: int, input_bytes: int = 100, inside_bytes: int = 500) -> Problem:
    """Layers that hold their input or, in a segment, nothing."""
    options = (
        Option("keep", inside_bytes, inside_bytes, inside_bytes, 0.0),
        Option("checkpoint", input_bytes, inside_bytes, inside_bytes, 1.0),
        Option("selective", 0, inside_bytes, inside_bytes, 1.0, chained=True),
    )
    regions = tuple(Region(f"layers.{r}", options, 0) for r in range(count))
    moments = [Moment(f"forward of {r.name}", 0, i, i) for i, r in enumerate(regions)]
    moments += [Moment(f"backward of {r.name}", 0, i, i, "backward") for i, r in enumerate(regions)]
    segments = []
    for first in range(count):
        for length in range(2, min(9, count - first + 1)):
            inner = range(first + 1, first + length)
            held = tuple((count + r, input_bytes * (min(r, inner[-1] - 1) - first)) for r in inner)
            segments.append(Segment(first, (1, *[2] * (length - 1)), 1.0 * (length - 1), held))
    return Problem(regions, tuple(moments), 0, segments=tuple(segments))


def test_a_deep_model_fits_where_its_inputs_alone_do_not() -> None:
    problem = deep(32)
    flat = minimise_peak(problem.flat())
    assert flat.peak_bytes == 31 * 100 + 500
    solution = SOLVERS["nested_dp"](replace(problem, budget_bytes=flat.peak_bytes * 3 // 4))
    assert solution.status is Status.OPTIMAL
    assert flat.recompute_seconds < solution.recompute_seconds < 2 * flat.recompute_seconds
    assert minimise_peak(problem).peak_bytes < flat.peak_bytes / 2


def test_what_is_stored_counts_only_where_a_moment_looks() -> None:
    region = Region("layers.0", (Option("selective", 36, 3, 0, 0.002),), 0)
    moments = (Moment("forward", 0, 0, 0), Moment("backward", 9, 0, 0, "backward"))
    solution = SOLVERS["nested_dp"](Problem((region,), moments, 10))
    assert (solution.choices, solution.peak_bytes) == ((0,), 9)


def test_segments_that_mean_nothing_are_refused() -> None:
    problem = deep(4)
    first = problem.segments[0]
    for wrong, why in (
        (replace(first, choices=(1,)), "1 regions, not two or more"),
        (replace(first, first=3), "ends before region 5"),
        (replace(first, choices=(2, 2)), "chained options but for its first: layers.0"),
        (replace(first, choices=(1, 3)), "option of layers.1 3"),
        (replace(first, held=((7, 50),)), "holds in backward of layers.3, outside of it"),
        (replace(first, held=((5, 50), (5, 50))), "a moment twice"),
        (replace(first, held=((5, -1),)), "not a whole number"),
        (replace(first, recompute_seconds=float("nan")), "recompute_seconds of segment 0 is nan"),
    ):
        with pytest.raises(ProblemError, match=why):
            SOLVERS["nested_dp"](replace(problem, segments=(wrong,)))
    with pytest.raises(ProblemError, match="offered twice"):
        SOLVERS["auto"](replace(problem, segments=(first, first)))


def test_a_problem_with_segments_in_a_file_is_the_same_problem() -> None:
    assert from_json(to_json(deep(4))) == deep(4)


def test_the_least_budget_that_is_named_is_the_solver_s_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem, path = deep(9), tmp_path / "problem.json"
    save_problem(problem, path)
    flat, nested = minimise_peak(problem.flat()).peak_bytes, minimise_peak(problem).peak_bytes
    assert nested < flat
    for solver, least in (("count_ilp", flat), ("nested_dp", nested), ("auto", nested)):
        options = ["--solver", solver, "--budget"]
        assert cli.main(["solve", str(path), *options, str(least - 1)]) == 3
        assert f"pass --budget {least}" in capsys.readouterr().err
        assert cli.main(["solve", str(path), *options, str(least)]) == 0


def test_segments_of_the_square_root() -> None:
    solution = SOLVERS["sqrt_n"](replace(deep(16), budget_bytes=10**6))
    assert solution.choices == (1, 2, 2, 2) * 4
    assert solution.recompute_seconds == 16 + 4 * 3
    without = SOLVERS["sqrt_n"](replace(deep(16), budget_bytes=10**6, segments=()))
    assert without.choices == (1,) * 16


def test_a_front_that_is_cut_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(deep(16), budget_bytes=2000)
    exact = nested_dp.solve(problem)
    monkeypatch.setattr(nested_dp, "MOST_STATES", 3)
    monkeypatch.setattr(nested_dp, "MOST_IN_ALL", 3)
    assert nested_dp.prove(problem, EXACT) is None
    cut = SOLVERS["nested_dp"](problem, EXACT)
    assert cut.status is Status.FEASIBLE
    assert cut.recompute_seconds >= exact.recompute_seconds
