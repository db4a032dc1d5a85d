"""Runs of identical regions: found where they are, and counted as well as enumerated."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from memfit.planner import InfeasibleBudget, plan
from memfit.solvers import (
    SOLVERS,
    Limits,
    Moment,
    NoSolver,
    Option,
    Problem,
    Region,
    SharedTensor,
    Solution,
    Status,
    _compat,
    brute_force,
    count_ilp,
    flat_ilp,
    load_problem,
    minimise_peak,
    nested_dp,
    peak_bytes,
)
from memfit.solvers.runs import find_runs
from tests.problems import EXACT, alternating, chain, layers, problems, runs

PROBLEMS = Path(__file__).parent / "golden" / "problems"
some = settings(max_examples=100, derandomize=True, deadline=None, database=None)
thousand = settings(some, max_examples=1000)
many = settings(some, max_examples=5000)


def agree(problem: Problem) -> None:
    """Counting, enumerating and trying all find the same seconds, and as low a peak."""
    best = SOLVERS["brute_force"](problem)
    for name in ("count_ilp", "flat_ilp"):
        solution = SOLVERS[name](problem, EXACT)
        assert solution.status is best.status, name
        assert solution.recompute_seconds == pytest.approx(best.recompute_seconds, abs=1e-6), name
        assert solution.peak_bytes == best.peak_bytes, name
    if best.choices:
        greedy = SOLVERS["greedy"](problem)
        if greedy.status is not Status.INFEASIBLE:
            assert greedy.recompute_seconds >= best.recompute_seconds - 1e-9


@thousand
@given(runs())
def test_counting_is_as_good_as_trying_all(problem: Problem) -> None:
    agree(problem)


@thousand
@given(problems())
def test_counting_is_as_good_as_trying_all_without_runs(problem: Problem) -> None:
    agree(problem)


@pytest.mark.slow
@many
@given(runs())
def test_counting_is_as_good_as_trying_all_of_many(problem: Problem) -> None:
    agree(problem)


@pytest.mark.slow
@many
@given(problems())
def test_counting_is_as_good_as_trying_all_of_many_without_runs(problem: Problem) -> None:
    agree(problem)


@some
@given(runs())
def test_counting_finds_the_lowest_peak(problem: Problem) -> None:
    lowest = count_ilp.minimise_peak(problem, EXACT)
    assert lowest.peak_bytes == brute_force.minimise_peak(problem).peak_bytes


@some
@given(runs())
def test_without_the_lowest_peak_it_is_as_fast(problem: Problem) -> None:
    best = SOLVERS["brute_force"](problem)
    for name in ("count_ilp", "flat_ilp"):
        solution = SOLVERS[name](problem, replace(EXACT, lowest_peak=False))
        assert solution.status is best.status, name
        assert solution.recompute_seconds == pytest.approx(best.recompute_seconds, abs=1e-6), name
        if best.choices:
            assert best.peak_bytes <= solution.peak_bytes <= problem.budget_bytes, name


@pytest.mark.parametrize("name", ["presolve_1", "presolve_2"])
def test_optima_that_presolve_of_highs_lost_are_found(name: str) -> None:
    agree(load_problem(PROBLEMS / f"{name}.json"))


def spans(problem: Problem) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in find_runs(problem)]


def test_a_run_is_a_stretch_of_one_kind_with_even_bases() -> None:
    problem = chain(layers(6))
    # The last region's forward is followed by the loss.
    assert spans(problem) == [(0, 5), (5, 6)]
    other = Region("head", (Option("keep", 1, 1, 1, 0.0),), kind=1)
    mixed = chain((*layers(4), other, *layers(3)))
    assert spans(mixed) == [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
    moments = list(problem.moments)
    moments[6] = replace(moments[6], base_bytes=1)  # forward of layers.3
    uneven = replace(problem, moments=tuple(moments))
    assert spans(uneven) == [(0, 3), (3, 4), (4, 5), (5, 6)]


def test_what_looks_across_a_run_or_holds_a_tensor_in_one_region_ends_it() -> None:
    problem = chain(layers(6))
    ahead = replace(problem, moments=(*problem.moments, Moment("late", 0, stored=3, region=5)))
    assert spans(ahead) == [(0, 3), (3, 4), (4, 5), (5, 6)]
    mask = SharedTensor("mask", 7, ((2, 0),), (0,))
    assert spans(replace(problem, shared=(mask,))) == [(r, r + 1) for r in range(6)]


def test_the_size_of_the_program_does_not_depend_on_the_depth() -> None:
    choices = [Option("selective", 100 - 9 * o, 110, 150, 0.02 * o) for o in range(1, 9)]
    sizes = set()
    for depth in (20, 80, 200):
        problem = chain(layers(depth, *choices), budget=60 * depth)
        solution = SOLVERS["auto"](problem)
        assert (solution.solver, solution.status) == ("count_ilp", Status.OPTIMAL)
        assert solution.peak_bytes <= problem.budget_bytes
        assert solution.note.startswith(f"{depth - 1} neighbouring regions are identical")
        sizes.add((solution.variables, solution.rows))
    assert len(sizes) == 1
    assert sizes.pop()[0] < 50


def test_rows_of_a_run_may_end_between_multiples_of_the_sizes() -> None:
    """The bases rise by one byte where all sizes are threes: the budget is not rounded to those."""
    regions = tuple(
        Region(f"layers.{r}", (Option("keep", 0, 0, 3, 0.0),), kind=0) for r in range(4)
    )
    moments = tuple(Moment(f"backward {r}", 40 + r, r, r, "backward") for r in range(4))
    for budget, status in ((46, Status.OPTIMAL), (45, Status.INFEASIBLE)):
        problem = Problem(regions, moments, budget)
        assert [run.length for run in find_runs(problem)] == [4]
        assert SOLVERS["count_ilp"](problem).status is status


@pytest.mark.parametrize("name", ["count_ilp", "flat_ilp", "greedy"])
def test_a_budget_that_fits_all_recomputes_nothing(name: str) -> None:
    tiny = Option("selective", 40, 110, 150, 1e-9)
    problem = chain(layers(8, tiny, Option("selective", 0, 110, 150, 5.0)), budget=850)
    solution = SOLVERS[name](problem)
    assert (solution.recompute_seconds, solution.status) == (0.0, Status.OPTIMAL)


def test_auto_proves_or_enumerates_what_has_no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = tuple(replace(r, kind=i) for i, r in enumerate(layers(4)))
    solution = SOLVERS["auto"](chain(regions, budget=449))
    assert (solution.solver, solution.recompute_seconds) == ("nested_dp", 0.25)
    assert solution.status is Status.OPTIMAL
    monkeypatch.setattr(nested_dp, "MOST_IN_ALL", 3)
    solution = SOLVERS["auto"](chain(regions, budget=449), EXACT)
    assert (solution.solver, solution.recompute_seconds) == ("flat_ilp", 0.25)
    assert solution.note == "no neighbouring regions are identical enough to be counted"


@some
@given(alternating())
def test_auto_is_as_good_as_trying_all_where_regions_alternate(problem: Problem) -> None:
    best = SOLVERS["brute_force"](problem)
    solution = SOLVERS["auto"](problem, EXACT)
    assert solution.status is best.status
    assert solution.recompute_seconds == pytest.approx(best.recompute_seconds, abs=1e-9)
    assert solution.peak_bytes == best.peak_bytes
    loose = SOLVERS["auto"](problem, Limits(gap_seconds=0.002))
    assert loose.bound_seconds <= best.recompute_seconds + 1e-9
    assert loose.recompute_seconds <= best.recompute_seconds + 0.002 + 1e-9


def test_auto_has_an_answer_where_no_program_can_be_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object) -> Solution:
        raise NoSolver("none is installed")

    def unsolved(problem: Problem, limits: Limits) -> Solution:
        return Solution((), Status.UNSOLVED, 0.0, 0, "count_ilp")

    problem = chain(layers(4), budget=449)
    monkeypatch.setattr(count_ilp, "solve", missing)
    solution = SOLVERS["auto"](problem)
    assert (solution.solver, solution.status) == ("nested_dp", Status.OPTIMAL)
    assert "none is installed" in solution.note
    monkeypatch.setattr(count_ilp, "solve", unsolved)
    solution = SOLVERS["auto"](problem)
    assert (solution.solver, solution.status) == ("greedy", Status.FEASIBLE)
    assert "found no choice in 20 s" in solution.note


def test_a_solver_that_fails_is_named_and_the_next_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> _compat.Outcome:
        raise RuntimeError("out of paper")

    monkeypatch.setattr(_compat, "_minimise_with_highs", fail)
    cbc = _compat._minimise_with_cbc
    problem = chain(layers(4), budget=449)
    for stand_in in (cbc, fail):
        monkeypatch.setattr(_compat, "_minimise_with_cbc", stand_in)
        solution = SOLVERS["auto"](problem)
        assert (solution.recompute_seconds, solution.peak_bytes) == (0.25, 360)
        assert "HiGHS failed: out of paper" in solution.note
        if hasattr(_compat.pulp(), "PULP_CBC_CMD"):
            assert (solution.solver == "nested_dp") is (stand_in is fail)
    with pytest.raises(NoSolver, match="HiGHS failed: out of paper"):
        SOLVERS["flat_ilp"](problem)


def test_greedy_takes_the_cheapest_steps_and_takes_back_what_was_not_needed() -> None:
    dear = Option("selective", 5, 100, 140, 9.0)
    solution = SOLVERS["greedy"](chain(layers(4, dear), budget=449))
    assert solution.recompute_seconds == 0.25
    free = SOLVERS["greedy"](chain(layers(4, dear), budget=450))
    assert (free.status, free.choices) == (Status.OPTIMAL, (0, 0, 0, 0))
    none = SOLVERS["greedy"](chain(layers(4), budget=100))
    assert none.status is Status.INFEASIBLE
    assert peak_bytes(chain(layers(4)), none.choices) > 100


def test_keep_attention_keeps_it_and_recomputes_the_rest() -> None:
    attention = Option("selective", 40, 100, 155, 0.2, keep=("self_attn.sdpa", "self_attn.sdpa[1]"))
    more = Option("selective", 60, 100, 155, 0.1, keep=("self_attn.sdpa", "mlp.up_proj.mm"))
    problem = chain((*layers(2, more, attention), *layers(1)), budget=10**6)
    solution = SOLVERS["keep_attention"](
        replace(
            problem,
            regions=tuple(replace(region, kind=len(region.options)) for region in problem.regions),
        )
    )
    assert solution.choices == (3, 3, 1)


def test_with_runs_less_budget_never_peaks_higher_and_more_is_never_slower() -> None:
    choices = [Option("selective", 100 - 7 * o, 120, 150 + o, 0.03 * o**1.5) for o in range(1, 12)]
    problem = chain(layers(24, *choices))
    solutions = [
        count_ilp.solve(replace(problem, budget_bytes=budget), EXACT)
        for budget in range(600, 2600, 100)
    ]
    found = [solution for solution in solutions if solution.choices]
    assert len(found) > 10
    assert [s.recompute_seconds for s in found] == sorted(
        (s.recompute_seconds for s in found), reverse=True
    )
    assert [s.peak_bytes for s in found] == sorted(s.peak_bytes for s in found)
    flat = flat_ilp.solve(replace(problem, budget_bytes=1500), EXACT)
    assert flat.recompute_seconds == pytest.approx(solutions[9].recompute_seconds)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_on_a_real_problem_more_budget_is_never_slower_and_less_never_peaks_higher(
    name: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    model, batch = make(name, layers=5)
    with pytest.raises(InfeasibleBudget):
        plan(model, 1, batch, costs="roofline", save_problem=tmp_path / "p.json")
    problem = load_problem(tmp_path / "p.json")
    least = minimise_peak(problem).peak_bytes
    most = SOLVERS["none"](problem).peak_bytes
    budgets = [least + (most - least) * i // 10 for i in range(11)]
    found = [SOLVERS["auto"](replace(problem, budget_bytes=b), EXACT) for b in budgets]
    assert {solution.status for solution in found} == {Status.OPTIMAL}
    seconds = [solution.recompute_seconds for solution in found]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1] == 0
    peaks = [solution.peak_bytes for solution in found]
    assert peaks == sorted(peaks)
    for index in (3, 7):
        flat = SOLVERS["flat_ilp"](replace(problem, budget_bytes=budgets[index]), EXACT)
        assert flat.recompute_seconds == pytest.approx(seconds[index], rel=1e-6)
