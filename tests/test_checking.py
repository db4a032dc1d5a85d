"""Problems that mean nothing are refused, wrong solutions caught, files give back what went in."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.solvers import (
    SOLVERS,
    Moment,
    Option,
    Problem,
    ProblemError,
    Region,
    SharedTensor,
    Solution,
    SolverBug,
    Status,
    load_problem,
    loads,
    save_problem,
    solution_to_json,
    validate,
    verify,
)
from memfit.solvers.check import checked, replayed
from memfit.solvers.problem_file import from_json, solution_from_json, to_json
from tests.problems import chain, layers, problems, runs

many = settings(max_examples=300, derandomize=True, deadline=None, database=None)


@many
@given(problems() | runs(), st.randoms(use_true_random=False))
def test_two_ways_of_counting_agree_to_the_byte(problem: Problem, random: Any) -> None:
    choices = tuple(random.randrange(len(region.options)) for region in problem.regions)
    replay = [bytes_ for bytes_, _ in replayed(problem, choices)]
    assert replay == list(loads(problem, choices))


@many
@given(problems() | runs())
def test_a_problem_in_a_file_is_the_same_problem(problem: Problem) -> None:
    again = from_json(to_json(problem))
    assert [r.name for r in again.regions] == [r.name for r in problem.regions]
    assert [r.options for r in again.regions] == [r.options for r in problem.regions]
    assert replace(again, regions=problem.regions) == problem
    assert to_json(again) == to_json(problem)


@pytest.mark.parametrize("name", ["auto", "greedy", "none"])
def test_a_solution_in_a_file_is_the_same_solution(name: str) -> None:
    problem = chain(layers(4), budget=449)
    solution = SOLVERS[name](problem)
    text = solution_to_json(problem, solution)
    assert solution_from_json(text) == solution
    value = json.loads(text)
    assert [region["action"] for region in value["regions"]] == [
        region.options[choice].action
        for region, choice in zip(problem.regions, solution.choices, strict=True)
    ]
    assert value["remedy"] == solution.status.remedy
    assert solution_from_json(solution_to_json(problem, Solution((), Status.UNSOLVED, 0.0, 0, "x")))


def test_options_stand_once_for_each_kind(tmp_path: Path) -> None:
    problem = chain(layers(50), budget=1000)
    save_problem(problem, tmp_path / "p.json")
    value = json.loads((tmp_path / "p.json").read_text())
    assert len(value["kinds"]) == 1 and len(value["regions"]) == 50
    assert load_problem(tmp_path / "p.json") == problem
    assert load_problem(tmp_path / "p.json", 7).budget_bytes == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema="memfit.problem/2"), "has schema 'memfit.problem/2'"),
        (lambda v: v.pop("moments"), r"\$.moments is missing"),
        (lambda v: v["moments"][0].update(base_bytes=1.5), r"moments\[0\].base_bytes is 1.5"),
        (lambda v: v["moments"][0].update(phase="sideways"), "'forward' or 'backward'"),
        (lambda v: v["regions"][2].update(kind=1), r"regions\[2\].kind is 1, there are 1 kinds"),
        (lambda v: v["kinds"][0][1].update(stored_bytes=-1), r"stored_bytes of option 1 \(check"),
        (lambda v: v["kinds"][0][0].update(recompute_seconds=math.nan), "seconds of option 0"),
        (lambda v: v["kinds"][0][0].update(recompute_seconds=10**401), "is a very long number"),
        (lambda v: v["kinds"][0][0].update(stored_bytes=10**30), "from 0 to 1000000000000000"),
        (lambda v: v["moments"][0].update(base_bytes=10**400), "number of very many digits"),
        (lambda v: v.update(budget_bytes=10**400), "the budget is a number of very many digits"),
    ],
)
def test_an_unusable_file_is_refused_with_the_place(
    change: Callable[[Any], None], message: str
) -> None:
    value = json.loads(to_json(chain(layers(3), budget=9)))
    change(value)
    with pytest.raises(ProblemError, match=message) as caught:
        from_json(json.dumps(value), "p.json")
    assert "p.json" in str(caught.value) and "--save-problem" in str(caught.value)


def test_a_file_that_is_none_or_is_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"cannot read .*none.json: No such file"):
        load_problem(tmp_path / "none.json")
    with pytest.raises(ProblemError, match=r"cannot read .*null byte"):
        load_problem(f"{tmp_path}/\0.json")
    with pytest.raises(ProblemError, match="is not a problem: maximum recursion"):
        from_json("[" * 100_000)
    (tmp_path / "cut.json").write_text(to_json(chain(layers(3)))[:100])
    with pytest.raises(ProblemError, match=r"cut.json is not a problem: .*; write it again"):
        load_problem(tmp_path / "cut.json")


KEEP = Option("keep", 10, 10, 10, 0.0)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (chain((Region("a", (replace(KEEP, recompute_seconds=math.nan),), 0),)), "of a is nan"),
        (chain((Region("a", (replace(KEEP, recompute_seconds=-1.0),), 0),)), "of a is -1.0"),
        (chain((Region("a", (replace(KEEP, recompute_seconds=1e308),), 0),)), "of a is 1e\\+308"),
        (chain((Region("a", (replace(KEEP, recompute_seconds=None),), 0),)), "of a is None"),  # type: ignore[arg-type]
        (chain((Region("a", (replace(KEEP, recompute_seconds=True),), 0),)), "of a is True"),
        (chain((Region("a", (replace(KEEP, recompute_seconds=math.inf),), 0),)), "of a is inf"),
        (chain((Region("a", (replace(KEEP, stored_bytes=-5),), 0),)), "stored_bytes .* of a is -5"),
        (
            chain((Region("a", (KEEP,), 0), Region("b", (KEEP, KEEP), 0))),
            "regions a and b are of one kind, 0, but have different options",
        ),
        (Problem((), (Moment("m", -1, 0),), 9), "base_bytes of m is -1"),
        (Problem((), (Moment("m", 0, 1),), 9), "m comes after the stored region 1, of which"),
        (Problem((), (Moment("m", 0, 0, region=0),), 9), "m is the work of region 0, of which"),
        (replace(chain(layers(1)), budget_bytes=1.5), "the budget is 1.5"),  # type: ignore[arg-type]
        (
            replace(chain(layers(1)), shared=(SharedTensor("mask", 1, ((0, 9),), ()),)),
            "mask is held by option of layers.0 9, of which there are 2",
        ),
        (
            replace(chain(layers(1)), shared=(SharedTensor("mask", 1, (), (9,)),)),
            "mask is in moment 9, of which there are 3",
        ),
    ],
)
def test_a_problem_that_means_nothing_is_refused_by_every_solver(
    problem: Problem, message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        validate(problem)
    for solve in SOLVERS.values():
        with pytest.raises(ProblemError, match=message):
            solve(problem)


PROBLEM = chain(layers(4), budget=449)
RIGHT = SOLVERS["auto"](PROBLEM)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(RIGHT, peak_bytes=RIGHT.peak_bytes - 1), "states a peak of 359, there are 360 in"),
        (replace(RIGHT, recompute_seconds=0.2), r"states 0.2 s, its choice takes 0.25"),
        (replace(RIGHT, choices=(0, 0, 0)), "chose for 3 of 4"),
        (replace(RIGHT, choices=(0, 0, 0, 2)), "option 2 of layers.3, which has no such one"),
        (replace(RIGHT, choices=()), "calls its answer optimal but gives none"),
        (replace(RIGHT, status=Status.INFEASIBLE), "calls infeasible what takes 360 of 449"),
        (replace(RIGHT, bound_seconds=0.3), "bound of 0.3 s above its 0.25"),
        (
            replace(RIGHT, choices=(0, 0, 0, 0), peak_bytes=450, recompute_seconds=0.0,
                    bound_seconds=0.0),
            "calls optimal what takes 450 of 449 bytes in backward of layers.3, where layers.3 "
            r"runs option 0 \(keep\)",
        ),
    ],
)  # fmt: skip
def test_a_solution_that_is_not_what_it_says_is_a_bug(wrong: Solution, message: str) -> None:
    verify(PROBLEM, RIGHT)
    with pytest.raises(SolverBug, match=message):
        verify(PROBLEM, wrong)
    with pytest.raises(SolverBug, match=message):
        checked(lambda problem, limits: wrong)(PROBLEM)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "keep_attention"])
def test_trivial_problems_have_the_trivial_answer(name: str) -> None:
    free = Option("keep", 0, 0, 0, 0.0)
    for regions in (
        (Region("only", (free,), 0),),
        (Region("a", (free, replace(free, action="checkpoint")), 0),) * 3,
    ):
        solution = SOLVERS[name](chain(regions, budget=0))
        assert (solution.recompute_seconds, solution.peak_bytes) == (0.0, 0)
        assert solution.status is Status.OPTIMAL
