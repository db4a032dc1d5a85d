"""Plan JSON: exact round trips, the contract's keys, and errors that name the place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memfit.planner import Plan, plan
from memfit.planner.document import (
    Baseline,
    MadeWith,
    Model,
    Predicted,
    RegionPlan,
    SolverReport,
    TensorSpec,
    Workload,
)
from memfit.planner.errors import PlanError

PLAN = Plan(
    made_with=MadeWith("0.1", "2.13.0", None),
    model=Model("Toy", "class:1-parameters:2", 10, 8),
    workload=Workload({"x": TensorSpec((2, 3), "int64")}, None, "cpu", "roofline of cpu", False),
    budget_bytes=1000,
    predicted=Predicted(
        900, "backward of a.0", 100, 1.5, 0.5, 0.5, 1200, 1.0, {"activation": 800, "batch": 100}
    ),
    solver=SolverReport("ilp", "optimal", 0.0, 0.01),
    regions=(RegionPlan("a.0", "checkpoint", (), 10, 90, 0.5, ""),),
    baselines=(Baseline("none", 1200, 0.0),),
)


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_keys_are_those_of_the_contract(make: Callable[..., Any]) -> None:
    model, batch = make("bert", layers=1)
    value = json.loads(plan(model, 1 << 40, batch).to_json())
    assert list(value)[:7] == [
        "schema", "made_with", "model", "workload", "budget_bytes", "predicted", "solver",
    ]  # fmt: skip
    assert value["schema"] == "memfit.plan/1"
    assert value["made_with"].keys() == {"memfit", "torch", "transformers"}
    assert value["model"].keys() >= {
        "class", "fingerprint", "parameters", "trainable_parameters",
    }  # fmt: skip
    assert value["workload"]["batch"]["input_ids"] == {"shape": [2, 16], "dtype": "int64"}
    assert value["workload"].keys() >= {"batch", "optimizer", "device"}
    assert value["predicted"].keys() >= {
        "peak_bytes", "peak_at", "resident_bytes", "step_seconds", "recompute_seconds",
        "overhead", "unplanned_peak_bytes", "unplanned_step_seconds",
    }  # fmt: skip
    assert value["solver"].keys() == {"name", "status", "gap", "seconds"}
    assert value["regions"][0].keys() >= {
        "name", "action", "keep", "stored_bytes", "recompute_seconds",
    }  # fmt: skip


def test_attributes_are_named_as_the_keys() -> None:
    assert PLAN.predicted.peak_bytes == 900
    assert PLAN.regions[0].action == "checkpoint"
    assert PLAN.model.class_ == "Toy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"schema": "memfit.plan/2"}, r"schema 'memfit\.plan/2', this memfit reads"),
        (lambda v: {k: x for k, x in v.items() if k != "schema"}, "has schema None"),
        (lambda v: v | {"budget_bytes": "1000"}, r'\$\.budget_bytes is "1000", expected int'),
        (lambda v: v | {"budget_bytes": True}, r"\$\.budget_bytes is true, expected int"),
        (lambda v: v | {"regions": [{"name": "a.0"}]}, r"\$\.regions\[0\]\.action is missing"),
        (
            lambda v: v | {"regions": [v["regions"][0] | {"action": "recompute"}]},
            r"\$\.regions\[0\]\.action is 'recompute', known are keep",
        ),
        (lambda v: v | {"model": []}, r"\$\.model is not an object"),
        (lambda v: [v], "has schema None"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_place(
    change: Callable[[Any], Any], message: str
) -> None:
    text = json.dumps(change(json.loads(PLAN.to_json())))
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_unknown_keys_of_later_minor_versions_are_ignored() -> None:
    value = json.loads(PLAN.to_json()) | {"later": 1}
    assert Plan.from_json(json.dumps(value)) == PLAN


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=r"cannot read .*plan\.json: No such file"):
        Plan.load(path)
    path.write_text(PLAN.to_json()[:200])
    with pytest.raises(PlanError, match=r"plan\.json is not a plan: .*truncated"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(path)
