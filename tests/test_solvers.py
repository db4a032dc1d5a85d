"""The solvers against brute force on small random problems, and what each promises besides."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.solvers import (
    SOLVERS,
    Limits,
    Moment,
    Option,
    Problem,
    Region,
    SharedTensor,
    Solution,
    Status,
    baselines,
    brute_force,
    flat_ilp,
    loads,
    peak_bytes,
    recompute_seconds,
)
from memfit.solvers.ordering import in_order
from tests.problems import EXACT, chain, layers, problems

few = settings(max_examples=150, derandomize=True, deadline=None, database=None)
fewer = settings(few, max_examples=50)


def same(solution: Solution, reference: Solution) -> None:
    assert solution.status is reference.status
    assert solution.recompute_seconds == pytest.approx(reference.recompute_seconds, abs=1e-9)
    assert solution.peak_bytes == reference.peak_bytes


@few
@given(problems())
def test_ilp_is_as_good_as_brute_force(problem: Problem) -> None:
    solution = flat_ilp.solve(problem, EXACT)
    same(solution, brute_force.solve(problem))
    if solution.status is Status.INFEASIBLE:
        assert solution.choices == ()
        assert brute_force.minimise_peak(problem).peak_bytes > problem.budget_bytes
        return
    assert solution.gap <= 1e-6
    assert solution.peak_bytes == max(loads(problem, solution.choices)) <= problem.budget_bytes
    assert solution.recompute_seconds == recompute_seconds(problem, solution.choices)


@few
@given(problems())
def test_ilp_finds_the_lowest_peak(problem: Problem) -> None:
    same(flat_ilp.minimise_peak(problem, EXACT), brute_force.minimise_peak(problem))


@fewer
@given(problems())
def test_a_lowest_peak_is_a_feasible_budget_and_a_byte_less_is_not(problem: Problem) -> None:
    lowest = flat_ilp.minimise_peak(problem)
    at_peak = replace(problem, budget_bytes=lowest.peak_bytes)
    same(flat_ilp.solve(at_peak), lowest)
    below = flat_ilp.solve(replace(problem, budget_bytes=lowest.peak_bytes - 1))
    assert (below.status, below.choices) == (Status.INFEASIBLE, ())


@fewer
@given(problems(), st.lists(st.integers(0, 30), min_size=2, max_size=4))
def test_more_budget_is_never_slower_and_less_never_peaks_higher(
    problem: Problem, steps: list[int]
) -> None:
    unit = max(1, problem.budget_bytes // 40)
    budgets = sorted(problem.budget_bytes + step * unit for step in steps)
    solutions = [flat_ilp.solve(replace(problem, budget_bytes=b), EXACT) for b in budgets]
    feasible = [solution for solution in solutions if solution.choices]
    assert solutions[len(solutions) - len(feasible) :] == feasible
    for less, more in pairwise(feasible):
        assert more.recompute_seconds <= less.recompute_seconds + 1e-9
        assert less.peak_bytes <= more.peak_bytes


@fewer
@given(problems(), st.integers(0, 10**6), st.integers(1, 9))
def test_never_over_budget_where_a_byte_is_less_than_the_tolerance(
    problem: Problem, seed: int, step: int
) -> None:
    """Regions far above 10 GB with odd sizes: rows are true to some bytes, the answer to one."""
    big = 10**10
    regions = tuple(
        replace(
            region,
            options=tuple(
                replace(option, stored_bytes=option.stored_bytes * big + (seed + r * o * step) % 11)
                for o, option in enumerate(region.options)
            ),
        )
        for r, region in enumerate(problem.regions)
    )
    large = replace(problem, regions=regions)
    reference = brute_force.minimise_peak(large)
    for budget in (reference.peak_bytes, reference.peak_bytes + step, reference.peak_bytes + big):
        solution = flat_ilp.solve(replace(large, budget_bytes=budget))
        if solution.choices:
            assert peak_bytes(large, solution.choices) <= budget
            best = brute_force.solve(replace(large, budget_bytes=budget))
            assert solution.bound_seconds <= best.recompute_seconds + 1e-9
        else:
            assert solution.status is not Status.OPTIMAL


def test_a_choice_that_only_rounding_lets_through_is_not_returned() -> None:
    budget = 10**11
    fast = Option("selective", 0, 0, budget + 3, 1.0)
    slow = Option("checkpoint", 0, 0, budget - 10**6, 2.0)
    problem = chain((Region("layers.0", (fast, slow), 0),), budget)
    solution = flat_ilp.solve(problem)
    assert (solution.choices, solution.status) == ((1,), Status.FEASIBLE)
    assert solution.bound_seconds == pytest.approx(1.0)


def test_sizes_in_multiples_of_512_are_exact_at_a_terabyte() -> None:
    budget = 2**31 * 512
    fast = Option("selective", 0, 0, budget, 1.0)
    slow = Option("checkpoint", 0, 0, budget - 512, 2.0)
    problem = chain((Region("layers.0", (fast, slow), 0),), budget)
    for room, choices in ((0, (0,)), (-1, (1,)), (-512, (1,)), (-513, ())):
        solution = flat_ilp.solve(replace(problem, budget_bytes=budget + room))
        status = Status.OPTIMAL if choices else Status.INFEASIBLE
        assert (solution.choices, solution.status) == (choices, status)


def test_a_moment_may_look_ahead_of_what_is_stored() -> None:
    """At work in a later region while holders between it and the stored ones do not count yet."""
    regions = layers(4)
    tensor = SharedTensor("residual", 1000, holders=((0, 0), (1, 0), (3, 0)), moments=(0,))
    rows = (Moment("late", 0, stored=1, region=3), Moment("loss", 0, stored=4))
    for budget in (400, 1000, 1050, 1111, 1210):
        problem = Problem(regions, rows, budget, (tensor,))
        same(flat_ilp.solve(problem, EXACT), brute_force.solve(problem))


def test_equal_moments_make_one_row_with_the_highest_base() -> None:
    problem = chain(layers(2))
    tensor = SharedTensor("residual", 5, ((0, 0),), moments=(4,))
    again = tuple(replace(moment, base_bytes=9) for moment in problem.moments)
    doubled = replace(problem, moments=(*problem.moments, *again), shared=(tensor,))
    kept = flat_ilp.binding_moments(doubled)
    assert sorted(kept) == [(4, 0), *((index, 9) for index in range(5, 10))]


@pytest.mark.parametrize("find", [flat_ilp.solve, brute_force.solve])
def test_fewest_seconds_counted_by_hand(find: Callable[[Problem], Solution]) -> None:
    # Four layers of 100 kept or 10 stored: the last backward is 3 * 100 + 150 when all are kept.
    problem = chain(layers(4), budget=450)
    assert find(problem).recompute_seconds == 0.0
    one = find(replace(problem, budget_bytes=449))
    assert one.recompute_seconds == 0.25
    # One of the first three checkpointed: 10 + 100 + 100 + 150. The last one: 3 * 100 + 160.
    assert (sum(one.choices[:3]), one.choices[3], one.peak_bytes) == (1, 0, 360)


@pytest.mark.parametrize("find", [flat_ilp.minimise_peak, brute_force.minimise_peak])
def test_lowest_peak_counted_by_hand(find: Callable[[Problem], Solution]) -> None:
    # 3 * 10 + 150 with the last layer kept, 3 * 10 + 160 with it checkpointed.
    solution = find(chain(layers(4)))
    assert (solution.choices, solution.peak_bytes) == ((1, 1, 1, 0), 180)
    assert solution.recompute_seconds == 0.75


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_signs_with_its_name_and_takes_an_empty_problem(name: str) -> None:
    solution = SOLVERS[name](Problem((), (Moment("step", 7, 0),), budget_bytes=7))
    signed = "nested_dp" if name == "auto" else name
    assert (solution.solver, solution.choices) == (signed, ())
    assert (solution.status, solution.peak_bytes) == (Status.OPTIMAL, 7)
    over = SOLVERS[name](Problem((), (Moment("step", 7, 0),), budget_bytes=6))
    assert over.status is Status.INFEASIBLE


@pytest.mark.parametrize("module", [flat_ilp, brute_force])
def test_a_region_without_options_is_infeasible(module: ModuleType) -> None:
    problem = chain((Region("empty", (), 0), *layers(1)), budget=1000)
    assert module.solve(problem).status is Status.INFEASIBLE
    assert module.minimise_peak(problem).status is Status.INFEASIBLE


def test_baselines_choose_what_they_say() -> None:
    selective = Option("selective", 50, 100, 155, 0.1)
    other = Option("selective", 60, 100, 155, 0.05)
    head = Region("lm_head", (selective, other), kind=1)  # neither keep nor checkpoint
    norm = Region("norm", (Option("keep", 1, 2, 3, 0.0),), kind=2)
    a, b, c, d, e = layers(5, selective)
    problem = chain((norm, a, b, head, c, d, e), budget=10**6)
    assert baselines.none(problem).choices == (0, 0, 0, 1, 0, 0, 0)
    assert baselines.full(problem).choices == (0, 1, 1, 1, 1, 1, 1)
    assert baselines.every_n(problem, n=1).choices == baselines.full(problem).choices
    assert baselines.every_n(problem, n=2).choices == (0, 1, 0, 1, 1, 0, 1)
    assert baselines.every_n(problem, n=3).choices == (0, 1, 0, 1, 0, 1, 0)
    assert SOLVERS["every_4"](problem).choices == (0, 1, 0, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="n >= 1, got 0"):
        baselines.every_n(problem, n=0)


def test_baselines_say_whether_they_fit() -> None:
    problem = chain(layers(4), budget=449)
    none, half, full = (SOLVERS[name](problem) for name in ("none", "every_2", "full"))
    assert (none.status, none.peak_bytes, none.choices) == (Status.INFEASIBLE, 450, (0, 0, 0, 0))
    assert (half.status, half.recompute_seconds) == (Status.FEASIBLE, 0.5)
    assert half.peak_bytes == 10 + 100 + 10 + 150
    assert (full.status, full.recompute_seconds) == (Status.FEASIBLE, 1.0)
    assert full.peak_bytes == 3 * 10 + 160
    assert SOLVERS["none"](replace(problem, budget_bytes=450)).status is Status.OPTIMAL


def test_brute_force_refuses_more_choices_than_it_can_try() -> None:
    with pytest.raises(ValueError, match=r"at most 1048576 choices, the problem has 2097152"):
        brute_force.solve(chain(layers(21), budget=1000))


def test_eighty_identical_regions_are_solved_to_proof() -> None:
    problem = chain(layers(80), budget=4321)
    solution = flat_ilp.solve(problem)
    # n kept of the first 79 and the last kept too: 100 n + 10 (79 - n) + 150 <= 4321.
    assert (solution.status, solution.recompute_seconds) == (Status.OPTIMAL, 0.25 * (79 - 37))
    assert solution.gap < 1e-6
    assert solution.solve_seconds < 10  # 0.05 s where this was written


def test_a_time_limit_ends_the_search_with_a_truthful_status() -> None:
    options = tuple(
        Option("selective", 997 * o**2 % 1009, 1100 + o, 1700 + 31 * o, (1009 - 991 * o % 1009) / 7)
        for o in range(1, 13)
    )
    problem = chain(tuple(Region(f"layers.{r}", options, 0) for r in range(150)), budget=60_000)
    solution = flat_ilp.solve(problem, Limits(gap=0.0, seconds=0.01))
    assert solution.status in (Status.OPTIMAL, Status.FEASIBLE, Status.UNSOLVED)
    if solution.choices:
        assert solution.peak_bytes <= problem.budget_bytes
        assert solution.bound_seconds <= solution.recompute_seconds


def test_solving_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for budget in (100, 300, 1000):
        flat_ilp.solve(chain(layers(4), budget))
    flat_ilp.minimise_peak(chain(layers(4)))
    assert capfd.readouterr() == ("", "")


def run_python(code: str) -> str:
    """The output of ``code`` in a fresh interpreter where every warning is an error."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


SMALL = """
from memfit.solvers import *
regions = tuple(
    Region(str(r), (Option("keep", 9, 9, 9, 0.0), Option("checkpoint", 1, 9, 10, 0.5)), 0)
    for r in range(4)
)
problem = Problem(regions, (Moment("loss", 0, 4),), 25)
"""


def test_importing_the_solvers_imports_neither_pulp_nor_torch() -> None:
    code = "import sys, memfit.solvers; print({'pulp', 'torch', 'numpy'} & set(sys.modules))"
    assert run_python(code) == "set()\n"


def test_a_first_solve_holds_on_to_nothing_of_its_caller() -> None:
    caller = """
import gc, weakref

class Model: pass

def solve():
    model = Model()
    SOLVERS["auto"](problem)
    return weakref.ref(model)

held = solve()
gc.collect()
print(held())
"""
    assert run_python(f"{SMALL}\n{caller}").splitlines()[-1] == "None"


def test_the_solver_runs_whatever_threads_highs_was_first_used_with() -> None:
    first = (
        "import highspy; h = highspy.Highs(); h.silent(); h.setOptionValue('threads', 3); h.run()"
    )
    solve = "print(SOLVERS['auto'](problem).recompute_seconds)"
    # HiGHS 1.16 greets when it is first used, here by the test.
    assert run_python(f"{first}\n{SMALL}\n{solve}").splitlines()[-1] == "1.0"


def test_without_highs_the_bundled_cbc_solves_or_the_error_says_what_to_install() -> None:
    solve = """
import sys
sys.modules["highspy"] = None
from memfit.solvers._compat import NoSolver
for budget in (25, 36, 3):
    try:
        solution = SOLVERS["auto"](Problem(regions, problem.moments, budget))
        print(solution.status.name, solution.recompute_seconds, end=" ")
    except NoSolver as error:
        print(error)
"""
    output = run_python(SMALL + solve)
    assert output == "OPTIMAL 1.0 OPTIMAL 0.0 INFEASIBLE 0.0 " or (
        output.count("pip install highspy") == 3
    )


def test_identical_regions_are_put_in_order() -> None:
    """Scattered checkpoints of identical regions come first; others stay where they are."""
    keep, checkpoint = Option("keep", 100, 100, 150, 0.0), Option("checkpoint", 10, 100, 150, 1.0)
    regions = tuple(Region(f"layers.{r}", (keep, checkpoint), kind=r % 2) for r in range(6))
    moments = tuple(Moment(f"backward of layers.{r}", 0, r, r, "backward") for r in range(6))
    problem = Problem(regions, moments, 10_000)
    assert in_order(problem, (0, 1, 0, 0, 1, 0)) == (1, 1, 0, 0, 0, 0)
    # Nothing moves when it would raise the peak: here only the last region has room to recompute.
    late = tuple(replace(m, base_bytes=0 if m.stored == 5 else 600) for m in moments)
    pinned = Problem(regions, late, 10_000)
    wide = replace(checkpoint, backward_bytes=900)
    pinned = replace(pinned, regions=tuple(replace(r, options=(keep, wide)) for r in regions))
    assert in_order(pinned, (0, 0, 0, 0, 0, 1)) == (0, 0, 0, 0, 0, 1)
