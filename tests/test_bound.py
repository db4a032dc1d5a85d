"""Bounds: no plan is below them, and they are reached where that can be known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memfit.planner import Plan, plan
from memfit.planner.bound import general_graph
from memfit.planner.capture import capture
from memfit.planner.report import format_plan
from memfit.solvers.general import peak_bytes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)).exp()


class Small(nn.Module):
    """Few enough ops for the general problem."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return {"loss": F.mse_loss(x, torch.zeros_like(x))}


def test_a_plan_is_not_below_its_bounds() -> None:
    model, batch = Small(), {"x": torch.ones(4096, 64)}
    unplanned = plan(model, 2**40, batch, costs="roofline", bound=True)
    assert unplanned.bounds is not None
    assert (unplanned.bounds.regions, unplanned.bounds.general) == (0.0, 0.0)
    budget = unplanned.predicted.unplanned_peak_bytes * 9 // 10
    for solver in ("auto", "greedy", "full"):
        p = plan(model, budget, batch, costs="roofline", solver=solver, bound=True)
        assert p.bounds is not None and p.bounds.general is not None
        assert 0 < p.bounds.general <= p.bounds.regions <= p.predicted.overhead * (1 + 1e-9)
        if solver == "auto":
            assert p.bounds.regions == pytest.approx(p.predicted.overhead)
        assert "no schedule of any kind less than" in format_plan(p)
        assert Plan.from_json(p.to_json()) == p


def test_a_step_of_many_ops_has_the_bound_of_its_regions(make: Callable[..., Any]) -> None:
    model, batch = make("bert", layers=2)
    p = plan(model, 2**40, batch, costs="roofline")
    tight = p.predicted.unplanned_peak_bytes - 1000
    p = plan(model, tight, batch, costs="roofline", bound=True)
    assert p.bounds is not None
    assert p.bounds.general is None and "results; schedules are bounded up to" in p.bounds.note
    assert p.bounds.note in " ".join(format_plan(p).split())


def test_the_graph_takes_no_more_than_the_step_does() -> None:
    step = capture(Small(), {"x": torch.ones(512, 64)})
    graph = general_graph(step)
    assert sum(node.seconds for node in graph.nodes) == sum(op.seconds for op in step.ops)
    once = peak_bytes(graph, tuple(range(len(graph.nodes))))
    alive = [
        sum(
            s.size_bytes
            for i, s in enumerate(step.storages)
            if not s.kind.resident
            and s.born <= clock
            and clock < max(s.released, *(x.until for x in step.saved if x.storage == i), 0)
        )
        for clock in range(len(step.ops))
    ]
    assert 0 < once <= max(alive)
