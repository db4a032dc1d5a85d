"""``memfit explain``: what decisions cost, and what other budgets would do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from memfit.integrations import cli
from memfit.planner import Plan
from memfit.planner.document import NearbyBudget, Predicted, RegionPlan, Sensitivity
from memfit.planner.errors import PlanError
from memfit.planner.explaining import explain, format_explanation, regions_named
from memfit.planner.preparing import prepare
from memfit.planner.report import WIDTH
from memfit.planner.sensitivity import find_sensitivity
from memfit.solvers import SOLVERS, Option, Problem, Segment, nearby_seconds, peak_bytes
from tests.problems import chain, layers, problems, runs
from tests.test_document import PLAN

Output = pytest.CaptureFixture[str]

GIB = 2**30


def make_plan(budget_gib: int = 20, seconds: float = 0.5) -> Plan:
    """A plan that frees 6 GiB, of a step that peaks at 26 GiB unplanned."""
    selective = RegionPlan("h.0", "selective", ("a",), GIB, 2 * GIB, seconds / 5, "", ("b",))
    return replace(
        PLAN,
        budget_bytes=budget_gib * GIB,
        predicted=Predicted(
            20 * GIB, "backward of the loss", GIB, 10 + seconds, seconds, seconds / 10, 26 * GIB,
            10.0, {"activation": 15 * GIB, "parameter": 5 * GIB},
        ),
        regions=(
            replace(selective, name="h.0"),
            replace(selective, name="h.1", recompute_seconds=seconds * 4 / 5, freed_bytes=4 * GIB),
            RegionPlan("h.2", "keep", (), 3 * GIB, 0, 0.0, "it writes a buffer"),
        ),
        sensitivity=Sensitivity(
            8 * GIB, 26 * GIB,
            tuple(NearbyBudget(n * GIB, s) for n, s in ((18, None), (19, 0.75), (21, 0.375))),
        ),
    )  # fmt: skip


# -- nearby budgets ------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(problems() | runs())
def test_nearby_seconds_can_be_done_and_fall_with_the_budget(problem: Problem) -> None:
    start = SOLVERS["brute_force"](problem)
    if not start.choices:
        return
    peak = start.peak_bytes
    budgets = [peak * percent // 100 for percent in (70, 90, 100, 110, 200)]
    found = nearby_seconds(problem, start.choices, budgets)
    assert found[2] == pytest.approx(start.recompute_seconds)
    assert found[2:] == sorted(map(float, found[2:]), reverse=True)  # type: ignore[arg-type]
    for budget, seconds in zip(budgets, found, strict=True):
        best = SOLVERS["brute_force"](replace(problem, budget_bytes=budget))
        if seconds is not None:
            assert best.choices and seconds >= best.recompute_seconds - 1e-9


def test_nearby_seconds_are_those_of_the_steps() -> None:
    problem, choices = chain(layers(4)), (1, 1, 1, 0)
    peak = peak_bytes(problem, choices)
    # Each further layer that is kept stores 90 bytes more, and saves a quarter of a second.
    budgets = [peak + 90 * n for n in (0, 1, 2, 10)]
    assert nearby_seconds(problem, choices, [*budgets, peak - 1]) == [0.75, 0.5, 0.25, 0.0, None]
    assert nearby_seconds(problem, (0, 0, 0, 0), budgets[1:3]) == [0.5, 0.25]


def test_segments_are_left_as_they_are() -> None:
    chained = Option("selective", 0, 100, 160, 0.25, (), True)
    problem = replace(chain(layers(2, chained)), segments=(Segment(0, (1, 2), 0.125),))
    peak = peak_bytes(problem, (1, 2))
    assert nearby_seconds(problem, (1, 2), [peak - 1, peak, 2 * peak]) == [None, 0.625, 0.625]


def test_a_plan_says_what_other_budgets_would_do(make: Callable[..., Any]) -> None:
    model, batch = make("llama", dropout=0.0)
    batch = {name: value.repeat(32, 1) for name, value in batch.items()}
    source = prepare(model, batch, costs="roofline")
    free = source.task.within(1 << 40).solve("auto").timeline.peak_bytes
    outcome = source.task.within(free * 8 // 10).solve("auto")
    found = find_sensitivity(outcome, free)
    assert found.free_budget_bytes == free
    assert 0 < found.unavoidable_bytes <= outcome.timeline.peak_bytes
    assert len(found.nearby) == 4
    for near in found.nearby[::2]:
        exact = source.task.within(near.budget_bytes).solve("auto").solution.recompute_seconds
        assert near.recompute_seconds is not None
        assert exact <= near.recompute_seconds * (1 + 1e-9) <= 1.25 * exact
    seconds = [near.recompute_seconds for near in found.nearby]
    assert sorted(seconds, reverse=True) == seconds  # type: ignore[type-var]


# -- the explanation -----------------------------------------------------------------------------


def test_decisions_and_prices_are_counted() -> None:
    explanation = explain(make_plan())
    first, second = explanation.decisions
    assert (first.regions, first.freed_bytes, first.seconds_per_gib) == ("h.0-1", 6 * GIB, 0.5 / 6)
    assert (second.regions, second.action, second.seconds_per_gib) == ("h.2", "keep", None)
    budgets = [(b.budget_bytes // GIB, b.recompute_seconds) for b in explanation.budgets]
    assert budgets == [(18, None), (19, 0.75), (20, 0.5), (21, 0.375), (26, 0.0)]
    assert [b.overhead for b in explanation.budgets] == [None, 0.075, 0.05, 0.0375, 0.0]
    assert explanation.saved_seconds_per_gib == pytest.approx(0.125)
    assert explanation.added_seconds_per_gib == pytest.approx(0.25)


def test_what_is_gathered_or_reduced_is_not_of_the_batch() -> None:
    alive = {"gathered parameter": 7 * GIB, "buffer of a collective": 4 * GIB}
    alive |= {"gradient bucket": 4 * GIB, "activation": 5 * GIB}
    plan = make_plan()
    sharded = replace(plan, predicted=replace(plan.predicted, alive_at_peak=alive))
    said = explain(sharded).advice[-1]
    assert "75.0 % of it are parameters, gradients, optimizer state and the like" in said


def test_what_helps_most_comes_first() -> None:
    made = make_plan()
    assert explain(made).advice == (
        "a budget of 26624 MiB, 30.0 % more, would need no recomputation",
        "the peak is in the backward of the loss; 75.0 % of it belong to the batch: a smaller or "
        "shorter one lowers it most",
    )
    assert made.sensitivity is not None
    stuck = replace(made, sensitivity=replace(made.sensitivity, unavoidable_bytes=20 * GIB - 1))
    assert explain(stuck).advice[0] == (
        "recomputing more buys next to nothing: 20.0 GiB are alive at once whatever is recomputed"
    )
    weights = replace(made.predicted, alive_at_peak={"parameter": 3, "gradient": 3, "batch": 2})
    advice = explain(replace(made, predicted=weights)).advice[-1]
    assert "75.0 % of it are parameters, gradients, optimizer state" in advice


def test_a_plan_that_recomputes_nothing() -> None:
    explanation = explain(make_plan(budget_gib=40, seconds=0.0))
    assert explanation.advice[0] == "nothing is recomputed, down to a budget of 26624 MiB"
    assert explanation.budgets[-1].note == "this plan"
    assert explanation.saved_seconds_per_gib is None


def test_a_plan_without_neighbours_is_explained_as_far_as_it_goes() -> None:
    older = replace(make_plan(), sensitivity=None)
    explanation = explain(older)
    assert len(explanation.decisions) == 2 and explanation.budgets == ()
    assert "make it again with this version" in explanation.advice[-1]
    said = format_explanation(older, explanation)
    assert "\n- the plan does not say what other budgets would do; make it again" in said


def test_an_unknown_region_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"'h.11' is no region of the plan; the nearest are h.1, "):
        regions_named(make_plan(), "h.11")
    with pytest.raises(PlanError, match="it has none"):
        regions_named(replace(make_plan(), regions=()), "h.11")


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = tmp_path / "plan.json"
    make_plan().save(made)
    return str(made)


def test_the_tables_fit_the_terminal(path: str, capsys: Output) -> None:
    assert cli.main(["explain", path]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "h.0-1   selective  6.00 GiB  500 ms  83.3 ms" in lines
    assert "19.0 GiB   -5.0 %     750 ms     7.5 %  at most" in lines
    assert "18.0 GiB  -10.0 %          -         -  no single changes lead there" in lines
    assert "one GiB more saves about 125 ms a step; one GiB less costs" in captured.out


def test_a_region_alone(path: str, capsys: Output) -> None:
    assert cli.main(["explain", path, "h.1"]) == 0
    out = capsys.readouterr().out
    assert "region      h.1: selective\n" in out
    assert "recomputes  for 400 ms in each step, 100 ms for each GiB that it frees; 80.0 %" in out
    assert "keep        a\nrecompute   b\n" in out
    assert cli.main(["explain", path, "h.2"]) == 0
    assert "kept        it writes a buffer\n" in capsys.readouterr().out
    assert cli.main(["explain", path, "h.0-1"]) == 0
    assert capsys.readouterr().out.count("region ") == 2
    assert cli.main(["explain", path, "h.3"]) == 2
    assert "'h.3' is no region of the plan" in capsys.readouterr().err


def test_json_says_the_same(path: str, capsys: Output) -> None:
    assert cli.main(["explain", path, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["schema"] == "memfit.explanation/1"
    assert value["saved_seconds_per_gib"] == pytest.approx(0.125)
    assert [budget["note"] for budget in value["budgets"]][2] == "this plan"
    assert cli.main(["explain", path, "h.0", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [(region["name"], region["keep"]) for region in value["regions"]] == [("h.0", ["a"])]
