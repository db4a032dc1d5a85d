"""Seconds of ops: the roofline's arithmetic, and measured seconds in its place."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from memfit.planner.capture import capture
from memfit.planner.costs import SAMPLE, SAMPLE_LAUNCHES, price, roofline_seconds
from memfit.planner.devices import DEVICES
from memfit.planner.measuring import measured_seconds
from memfit.planner.recompute import Effect, Recomputation
from memfit.planner.step_graph import StepGraph


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y.mean()


@pytest.fixture(scope="module")
def step() -> StepGraph:
    return capture(Model(), (torch.zeros(32, 64),))


def test_a_product_is_bound_by_its_flops_and_a_sum_by_its_bytes(step: StepGraph) -> None:
    device = replace(DEVICES["h100"], launch_seconds=0.0)
    product = next(op for op in step.ops if op.name == "aten.addmm.default")
    assert product.flops == 2 * 32 * 64 * 256
    assert product.moved_bytes == 4 * (256 + 32 * 64 + 64 * 256 + 32 * 256)
    computing = product.flops / (67e12 * device.compute_efficiency)
    moving = product.moved_bytes / (3.35e12 * device.bandwidth_efficiency)
    assert roofline_seconds(product, device) == pytest.approx(max(computing, moving))
    gelu = next(op for op in step.ops if op.name == "aten.gelu.default")
    moving = 2 * 4 * 32 * 256 / (3.35e12 * device.bandwidth_efficiency)
    assert roofline_seconds(gelu, device) == pytest.approx(moving)


def test_views_cost_nothing_and_kernels_a_launch(step: StepGraph) -> None:
    device = DEVICES["h100"]
    for op in price(step, device).ops:
        free = op.name in ("aten.t.default", "aten.view.default", "aten.expand.default")
        assert (op.seconds == 0.0) if free else (op.seconds >= device.launch_seconds)


def test_equal_ops_get_equal_measured_seconds(step: StepGraph) -> None:
    seconds = measured_seconds(step, torch.device("cpu"))
    ops = {op.signature for op in step.ops if op.flops or op.moved_bytes}
    assert seconds.keys() == ops | {SAMPLE}
    assert all(s > 0 for s in seconds.values())
    assert measured_seconds(step, torch.device("cpu")) == seconds, "a plan made again is the same"
    priced = price(step, DEVICES["cpu"], seconds)
    assert all(op.seconds == seconds.get(op.signature, 0.0) for op in priced.ops)
    assert priced.seconds == pytest.approx(sum(op.seconds for op in priced.ops))


def test_a_recomputation_costs_a_sample_beside_its_ops(step: StepGraph) -> None:
    device = DEVICES["h100"]
    by_roofline = price(step, device)
    assert by_roofline.recomputation_seconds == SAMPLE_LAUNCHES * device.launch_seconds
    seconds = measured_seconds(step, torch.device("cpu"))
    measured = price(step, DEVICES["cpu"], seconds)
    assert measured.recomputation_seconds == seconds[SAMPLE] > 0
    twice = Effect({}, (), (Recomputation(9, (0, 1), ()), Recomputation(7, (2,), ())))
    ops = sum(op.seconds for op in measured.ops[:3])
    assert twice.seconds(measured) == pytest.approx(ops + 2 * seconds[SAMPLE])


def test_measuring_leaves_the_generator_as_it_was(step: StepGraph) -> None:
    state = torch.get_rng_state()
    measured_seconds(step, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def test_ops_that_crash_on_made_up_memory_are_left_to_the_roofline() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.lstm(x)[0]
            return y.mean()

    step = capture(Recurrent(), (torch.zeros(4, 2, 8),))
    names = {op.signature: op.name for op in step.ops}
    measured = {names.get(s) for s in measured_seconds(step, torch.device("cpu"))}
    assert "aten.mkldnn_rnn_layer_backward.default" in {*names.values()} - measured
    assert "aten.mean.default" in measured
