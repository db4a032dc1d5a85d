"""Options that were worked out for one region and moved to others say what those do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memfit.planner import actions
from memfit.planner.actions import find_options
from memfit.planner.capture import capture
from memfit.planner.costs import price
from memfit.planner.devices import DEVICES
from memfit.planner.options import RegionOption, build_problem
from memfit.planner.regions import Region, find_regions
from memfit.planner.step_graph import StepGraph
from tests.chains import Tanh

Options = tuple[tuple[RegionOption, ...], ...]
_RNG_STATE_BYTES = 5056


def priced(model: nn.Module, batch: Any) -> tuple[StepGraph, tuple[Region, ...]]:
    step = price(capture(model, batch), DEVICES["cpu"])
    return step, find_regions(step)


def worked_out(
    step: StepGraph, regions: tuple[Region, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[Options, Options]:
    """The options as they are found, and those of a search that moves none."""
    found = find_options(step, regions, _RNG_STATE_BYTES)
    monkeypatch.setattr(actions, "likeness", lambda *_: None)
    return found, find_options(step, regions, _RNG_STATE_BYTES)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_moved_options_are_those_of_the_region(
    name: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, regions = priced(*make(name, layers=5))
    found, own = worked_out(step, regions, monkeypatch)
    moved = 0
    for ours, theirs in zip(found, own, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.effect == b.effect
            assert a.holds == b.effect.holds
            assert (a.action, a.keep, a.recompute, a.lean) == (
                b.action,
                b.keep,
                b.recompute,
                b.lean,
            )
            assert a.recompute_seconds == b.recompute_seconds
            moved += a.move is not None
    assert moved > 2 * len(found[1])
    assert build_problem(step, regions, found, 1, 512) == build_problem(step, regions, own, 1, 512)


class Unlike(nn.Module):
    """Four equal blocks; the result of the third is saved by what uses it outside, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1024))
        self.blocks = nn.ModuleList(Tanh() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.weight
        loss = torch.zeros(())
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 2:
                loss = loss + x.exp().sum()
        return loss + x.sum()


def test_what_is_alive_around_a_region_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    step, regions = priced(Unlike(), (torch.ones(1024),))
    found, own = worked_out(step, regions, monkeypatch)
    assert [[o.effect for o in region] for region in found] == [
        [o.effect for o in region] for region in own
    ]
    assert build_problem(step, regions, found, 1) == build_problem(step, regions, own, 1)
