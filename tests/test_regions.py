"""Which module calls become regions, found from the graph alone."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from memfit.planner.capture import capture
from memfit.planner.regions import find_regions

BLOCKS = {
    "bert": [f"bert.encoder.layer.{i}" for i in range(4)],
    "gpt2": [f"transformer.h.{i}" for i in range(4)],
    "llama": [f"model.layers.{i}" for i in range(4)],
    "vit": [f"vit.layers.{i}" for i in range(4)],
    "t5": [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in range(4)],
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_repeated_blocks_are_the_regions(
    name: str, attention: str, make: Callable[..., Any]
) -> None:
    model, batch = make(name, attention=attention)
    regions = find_regions(capture(model, batch))
    assert [r.name for r in regions if r.name in BLOCKS[name]] == BLOCKS[name]
    assert not any(r.kept_because for r in regions)
    for a, b in pairwise(regions):
        assert a.stop <= b.start and b.backward_stop <= a.backward_start


def test_first_blocks_of_t5_differ_from_the_others(make: Callable[..., Any]) -> None:
    model, batch = make("t5")
    kinds = [r.kind for r in find_regions(capture(model, batch))]
    assert len(set(kinds[1:4])) == len(set(kinds[5:8])) == 1
    assert len({kinds[0], kinds[1], kinds[4], kinds[5]}) == 4


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.linear(x))
        return x + y.tanh().exp()


class Stack(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], times: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            for block in self.blocks:
                x = block(x)
        return x.sum()


def test_blocks_that_change_buffers_are_kept_and_say_why() -> None:
    step = capture(Stack([Block(nn.BatchNorm1d(16)) for _ in range(3)]), (torch.zeros(4, 16),))
    regions = find_regions(step)
    assert [r.name for r in regions] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all("changes a buffer from outside in place" in r.kept_because for r in regions)


def test_each_call_of_a_shared_block_is_a_region() -> None:
    step = capture(Stack([Block(nn.LayerNorm(16))], times=2), (torch.zeros(4, 16),))
    first, second = find_regions(step)
    assert first.name == second.name == "blocks.0" and first.stop <= second.start
    assert first.kept_because == second.kept_because == ""


def test_a_block_that_runs_inside_of_another_too_is_kept_and_says_why() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y.sin().exp()

    shared = Block(nn.LayerNorm(16))
    blocks = [shared, Block(nn.LayerNorm(16)), Around(shared)]
    regions = find_regions(capture(Stack(blocks), (torch.zeros(4, 16),)))
    reasons = [r.kept_because for r in regions]
    assert reasons == ["called elsewhere in the step, too", "", ""]


def test_parallel_modules_are_no_chain() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Block(nn.LayerNorm(16)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum((e(x) for e in self.experts), x)

    step = capture(Stack([Experts() for _ in range(2)]), (torch.zeros(4, 16),))
    assert [r.name for r in find_regions(step)] == ["blocks.0", "blocks.1"]


def test_the_innermost_chain_is_taken() -> None:
    def stage() -> nn.Module:
        return nn.Sequential(*(Block(nn.LayerNorm(16)) for _ in range(2)))

    step = capture(Stack([stage(), stage()]), (torch.zeros(4, 16),))
    names = [r.name for r in find_regions(step)]
    assert names == ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]


def test_frozen_blocks_are_no_regions(make: Callable[..., Any]) -> None:
    model, batch = make("bert")
    for layer in model.bert.encoder.layer[:2]:
        layer.requires_grad_(False)
    model.bert.embeddings.requires_grad_(False)
    names = [r.name for r in find_regions(capture(model, batch))]
    assert names == ["bert.encoder.layer.2", "bert.encoder.layer.3"]


def test_modules_that_share_an_input_are_no_chain() -> None:
    """Two projections of one tensor, as adapters make them: the second does not read the first."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x.flatten(0, 0))
            return y.tanh().exp().sin()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = Branch(), Branch()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query: torch.Tensor = self.query(x)
            value: torch.Tensor = self.value(x)
            return x + query * value

    step = capture(Stack([Pair(), Pair()]), (torch.zeros(4, 16),))
    assert [r.name for r in find_regions(step)] == ["blocks.0", "blocks.1"]


def test_blocks_of_several_types_in_one_list_are_a_chain() -> None:
    class Other(Block):
        pass

    blocks = [Block(nn.LayerNorm(16)), Other(nn.LayerNorm(16)), Block(nn.LayerNorm(16))]
    regions = find_regions(capture(Stack(blocks), (torch.zeros(4, 16),)))
    assert [r.name for r in regions] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_block_that_keeps_a_tensor_in_itself_is_kept_and_says_why() -> None:
    class Recurrent(Block):
        state: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state = super().forward(x)
            return self.state

    step = capture(Stack([Recurrent(nn.LayerNorm(16)) for _ in range(2)]), (torch.zeros(4, 16),))
    assert [r.kept_because for r in find_regions(step)] == [
        f"blocks.{i} keeps a tensor of its forward in itself" for i in range(2)
    ]


def test_blocks_that_would_not_repeat_are_kept_and_say_why() -> None:
    class Draws(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * numpy.random.rand()

    class Generates(Block):
        generator = torch.Generator()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.rand(16, generator=self.generator)

    class Counts(Block):
        times = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.times += 1
            return super().forward(x)

    reasons = {
        Draws: "draws from the generator of Python or NumPy",
        Generates: "draws from a generator of its own",
        Counts: "changes its attribute 'times'",
    }
    for block, reason in reasons.items():
        step = capture(Stack([block(nn.LayerNorm(16)) for _ in range(2)]), (torch.zeros(4, 16),))
        assert [r.kept_because for r in find_regions(step)] == [
            f"blocks.{i} {reason}" for i in range(2)
        ]


def test_blocks_whose_input_is_changed_later_are_kept_and_say_why() -> None:
    class Masked(Block):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) * mask

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Masked(nn.LayerNorm(16)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.ones(16)
            for block in self.blocks:
                x = block(x, mask=mask)
            mask.zero_()
            return x.sum()

    regions = find_regions(capture(Outer(), (torch.zeros(4, 16),)))
    assert all("changes in place what the region reads" in r.kept_because for r in regions)
