"""A planned model is compiled: its gradients are right, and what is said of its peak is true."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memfit.integrations import apply
from memfit.integrations.forwards import MemfitWarning
from memfit.planner import InfeasibleBudget, Plan, plan

ROOT = Path(__file__).parents[1]
Factory = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def least(model: nn.Module, batch: Any, **options: Any) -> Plan:
    with pytest.raises(InfeasibleBudget) as error:
        plan(model, 1, batch, costs="roofline", **options)
    return plan(model, error.value.minimum_bytes, batch, costs="roofline", **options)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
def test_inductor_keeps_the_budget_with_a_tenth_to_spare() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_step", "0.5"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "a planned model is compiled" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "selective" in found["actions"]
    assert found["measured"] <= found["budget"]
    assert found["error"] < 1e-5


@pytest.mark.parametrize("selective", [True, False], ids=["selective", "checkpoint"])
def test_gradients_are_those_of_the_compiled_model(
    make: Factory, gradients: Callable[..., dict[str, torch.Tensor]], selective: bool
) -> None:
    model, batch = make("llama", dropout=0.0, layers=1)
    run = torch.compile(model, backend="aot_eager")
    expected = gradients(run, batch)
    made = least(model, batch, selective=selective)
    with apply(made, model):
        for _ in range(2):
            with pytest.warns(MemfitWarning, match=r"near the planned one, .* or do not compile"):
                found = gradients(run, batch)
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient)


def test_without_gradients_the_graph_is_whole(make: Factory) -> None:
    model, batch = make("llama", dropout=0.0, layers=1)
    apply(least(model, batch), model)
    with torch.no_grad():
        whole: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(whole(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("in_place", [True, False], ids=["model.compile()", "torch.compile(model)"])
def test_a_compiled_model_is_planned_as_it_is_and_stays_compiled(
    make: Factory, in_place: bool
) -> None:
    model, batch = make("llama", layers=1)
    expected = least(model, batch)
    compiled: Any = model
    if in_place:
        model.compile(backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="aot_eager")
    assert least(compiled, batch).regions == expected.regions
    assert "Compiled" in type(compiled(**batch).loss.grad_fn).__name__
    with apply(expected, compiled), pytest.warns(MemfitWarning):
        compiled(**batch).loss.backward()
