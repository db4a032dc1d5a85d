"""The simulator against sums made by hand, and the solver's rows against the simulator."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from memfit.planner import recompute
from memfit.planner.actions import find_options
from memfit.planner.capture import capture
from memfit.planner.costs import price
from memfit.planner.devices import DEVICES
from memfit.planner.optimizers import optimizer_factory
from memfit.planner.options import RegionOption, build_problem
from memfit.planner.peak import describe_peak
from memfit.planner.recompute import Effect
from memfit.planner.regions import Region, find_regions
from memfit.planner.simulate import Timeline, simulate
from memfit.planner.step_graph import StepGraph
from memfit.solvers import loads, peak_bytes
from tests.chains import UNIT, Chain


@pytest.fixture(scope="module")
def chain() -> tuple[StepGraph, tuple[Region, ...]]:
    step = capture(Chain(), (torch.zeros(UNIT // 4),))
    return step, find_regions(step)


def run(step: StepGraph, regions: tuple[Region, ...], checkpointed: set[int]) -> Timeline:
    effects = [
        recompute.checkpoint(step, region, 0) if r in checkpointed else recompute.keep(step, region)
        for r, region in enumerate(regions)
    ]
    return simulate(step, regions, effects)


def test_unplanned_peak_of_a_chain(chain: tuple[StepGraph, tuple[Region, ...]]) -> None:
    step, regions = chain
    assert [region.name for region in regions] == [f"blocks.{i}" for i in range(4)]
    assert step.resident_bytes() == 2 * UNIT  # the parameter and the batch
    # 8 outputs of tanh are saved; the backward of the last adds one gradient. The loss is 4 bytes,
    # and so is the gradient of the sum, which expands without memory.
    timeline = run(step, regions, set())
    assert timeline.peak_bytes == 2 * UNIT + 9 * UNIT + 8


def test_checkpointed_peak_of_a_chain(chain: tuple[StepGraph, tuple[Region, ...]]) -> None:
    step, regions = chain
    # Kept: the inputs of the four blocks. The backward of the last block recomputes 2 outputs (the
    # output that it returned is gone after the sum) and adds one gradient.
    timeline = run(step, regions, {0, 1, 2, 3})
    assert timeline.peak_bytes == 2 * UNIT + (4 + 2 + 1) * UNIT + 8
    assert describe_peak(step, regions, timeline).where == "backward of blocks.3"


def test_keeping_the_last_block_of_a_chain_costs_nothing(
    chain: tuple[StepGraph, tuple[Region, ...]],
) -> None:
    step, regions = chain
    assert run(step, regions, {0, 1, 2}).peak_bytes == run(step, regions, {0, 1, 2, 3}).peak_bytes


def test_recomputed_ops_are_those_up_to_the_last_saved_tensor(
    chain: tuple[StepGraph, tuple[Region, ...]],
) -> None:
    step, regions = chain
    timeline = run(step, regions, {1})
    again = timeline.ops[timeline.recomputed == 0 + 1]
    assert [step.ops[i].name for i in again] == ["aten.tanh.default"] * 2
    assert len(timeline.ops) == len(step.ops) + 2


def test_alive_at_the_peak_adds_up(chain: tuple[StepGraph, tuple[Region, ...]]) -> None:
    step, regions = chain
    for chosen in (set[int](), {0, 2}, {0, 1, 2, 3}):
        timeline = run(step, regions, chosen)
        assert sum(describe_peak(step, regions, timeline).alive_bytes.values()) == (
            timeline.peak_bytes
        )


def test_generator_states_count(chain: tuple[StepGraph, tuple[Region, ...]]) -> None:
    step, regions = chain
    effects = [recompute.checkpoint(step, region, 5056) for region in regions]
    plain = run(step, regions, {0, 1, 2, 3}).peak_bytes
    # One state is held for each region, all of them until the peak in the last one.
    assert simulate(step, regions, effects).peak_bytes == plain + 4 * 5056


def test_sizes_are_rounded_up_as_the_allocator_does(
    chain: tuple[StepGraph, tuple[Region, ...]],
) -> None:
    step, regions = chain
    effects = [recompute.keep(step, region) for region in regions]
    assert simulate(step, regions, effects, 512).peak_bytes == 11 * UNIT + 2 * 512


def test_adamw_holds_its_temporaries_in_the_optimizer_step() -> None:
    model = nn.Sequential(nn.Linear(256, 1024, bias=False), nn.Flatten(0), nn.Linear(1024, 1))
    factory = optimizer_factory("adamw", model, on_gpu=False)
    step = capture(model, (torch.zeros(1, 256),), optimizer=factory)
    timeline = simulate(step, (), ())
    peak = describe_peak(step, (), timeline)
    assert peak.where == "optimizer step"
    weights = sum(p.numel() * 4 for p in model.parameters())
    # Parameters, gradients, two moments; a square root and its quotient of the largest parameter.
    assert abs(timeline.peak_bytes - (4 * weights + 2 * UNIT)) < 10_000


def options_of(step: StepGraph, regions: tuple[Region, ...]) -> Sequence[Sequence[RegionOption]]:
    return find_options(price(step, DEVICES["cpu"]), regions, 5056)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_rows_of_the_problem_say_what_the_simulator_says(
    name: str, attention: str, make: Callable[..., Any]
) -> None:
    model, batch = make(name, attention=attention)
    step = capture(model, batch)
    regions = find_regions(step)
    options = options_of(step, regions)
    problem = build_problem(step, regions, options, 1 << 40)
    generator = random.Random(name)
    for _ in range(40):
        choices = [generator.randrange(len(o)) for o in options]
        chosen: list[Effect] = [o[c].effect for o, c in zip(options, choices, strict=True)]
        simulated = simulate(step, regions, chosen).peak_bytes
        rows = peak_bytes(problem, choices)
        assert simulated <= rows <= simulated * 1.01, choices
    assert len(loads(problem, [0] * len(regions))) >= 2 * len(regions)


def test_identical_blocks_are_interchangeable_for_the_solver(make: Callable[..., Any]) -> None:
    model, batch = make("bert", layers=6)
    step = capture(model, batch)
    regions = find_regions(step)
    problem = build_problem(step, regions, options_of(step, regions), 1 << 40)
    layers = [region for region in problem.regions if ".layer." in region.name]
    assert len(layers) == 6 and len({region.kind for region in layers}) == 1
