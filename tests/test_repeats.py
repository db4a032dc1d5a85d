"""A repeated layer that is recorded once gives the graph of a step recorded in full."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn

from memfit.planner import repeats
from memfit.planner.capture import capture
from memfit.planner.cuda_ops import cuda_modes
from memfit.planner.optimizers import optimizer_factory
from memfit.planner.step_graph import StepGraph

LAYERS = 5


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that were not run."""
    names: list[str] = []
    apply = repeats._StandIn.apply

    def noted(*args: Any) -> Any:
        names.append(args[-1].module)
        return apply(*args)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(repeats._StandIn, "apply", noted)
    return names


def nodes_of(step: StepGraph) -> list[tuple[Any, ...]]:
    """What the op at each place is and takes."""

    def layout(node: fx.Node) -> object:
        return node.meta.get("shape"), node.meta.get("stride"), node.meta.get("dtype")

    return [
        (index, str(n.target), layout(n), [layout(a) for a in n.all_input_nodes])
        for index, n in sorted(step.nodes.items())
    ]


def assert_same(one: StepGraph, other: StepGraph) -> None:
    assert_same_records(one, other)
    assert nodes_of(one) == nodes_of(other)


def assert_same_records(one: StepGraph, other: StepGraph) -> None:
    assert one.ops == other.ops
    assert one.storages == other.storages
    assert one.saved == other.saved
    assert one.calls == other.calls


@pytest.mark.parametrize("optimizer", [None, "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_the_graph_is_that_of_a_full_record(
    make: Callable[..., Any],
    stood_in: list[str],
    name: str,
    dropout: float,
    optimizer: str | None,
) -> None:
    model, batch = make(name, dropout, LAYERS)
    factory = optimizer_factory(optimizer, model, on_gpu=True)
    once = capture(model, batch, optimizer=factory)
    assert len(stood_in) == LAYERS - 1
    assert_same(once, capture(model, batch, optimizer=factory, repeats=False))


def test_gradients_of_earlier_steps_are_added_to(
    make: Callable[..., Any], stood_in: list[str]
) -> None:
    model, batch = make("llama", 0.1, LAYERS)
    factory = optimizer_factory("adamw", model, on_gpu=True)
    once = capture(model, batch, optimizer=factory, keep_gradients=True)
    assert len(stood_in) == LAYERS - 1
    full = capture(model, batch, optimizer=factory, keep_gradients=True, repeats=False)
    assert_same_records(once, full)  # the optimizer's nodes take the gradients from before


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_casts_that_autocast_caches_live_to_the_end_of_the_forward(
    make: Callable[..., Any], stood_in: list[str], name: str
) -> None:
    model, batch = make(name, 0.1, LAYERS)
    once = capture(model, batch, autocast=torch.bfloat16)
    assert len(stood_in) == LAYERS - 1, "a second record in full would have been needed"
    assert_same(once, capture(model, batch, autocast=torch.bfloat16, repeats=False))


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        # Sliding and full attention take turns; the first layer of each kind is recorded.
        (transformers.Gemma2Config(query_pre_attn_scalar=8, num_hidden_layers=6), 4),
        # Dense layers among those with experts.
        (
            transformers.Qwen3MoeConfig(
                num_hidden_layers=6, mlp_only_layers=[0, 3, 5], num_experts=4,
                num_experts_per_tok=2, moe_intermediate_size=16,
            ),
            4,
        ),
        # Dense layers first, as in most models with experts.
        (
            transformers.Qwen3MoeConfig(
                num_hidden_layers=6, mlp_only_layers=[0, 1, 2], num_experts=4,
                num_experts_per_tok=2, moe_intermediate_size=16,
            ),
            4,
        ),
    ],
)  # fmt: skip
def test_each_kind_of_layer_is_recorded_once(config: Any, layers: int, stood_in: list[str]) -> None:
    config.update(
        {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "sliding_window": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8,
        }
    )  # fmt: skip
    make: Any = transformers.AutoModelForCausalLM
    model = make.from_config(config).train()
    batch = {"input_ids": torch.arange(32).reshape(2, 16), "labels": torch.ones(2, 16).long()}
    once = capture(model, batch)
    assert len(stood_in) == layers
    assert_same(once, capture(model, batch, repeats=False))


class Block(nn.Module):
    """A layer with a number, as those of transformers have one."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """Blocks between an embedding and a loss."""

    def __init__(self, kind: Callable[[int], Block] = Block) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(kind(i) for i in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            made = block(x)
            x = made[0] if isinstance(made, tuple) else made
        return x.flatten().square().mean()  # the last layer's gradient is a view


class ReturnsATuple(Block):
    """As layers did that could return their attention weights."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class ReadsItsNumber(Block):
    """Does more in every second layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 2 if self.layer_idx % 2 else x)


class TakesTheLast(Block):
    """Uses what an earlier layer left with the model's first one."""

    def __init__(self, index: int, kept: list[torch.Tensor]) -> None:
        super().__init__(index)
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        self.kept.append(out)
        return out + self.kept[0]


class OneUnused(Block):
    """Has a parameter that gets no gradient."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.unused = nn.Parameter(torch.ones(2))


class ReturnsAPart(Block):
    """Keeps more alive than the tensor that it returns shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(x), x])[: len(x)]


def test_layers_whose_results_are_used_elsewhere_too_are_recorded_in_full() -> None:
    class Deep(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            results = [self.first(x)]
            for block in self.blocks:
                results.append(block(results[-1]))
            total: torch.Tensor = sum(x.square().mean() for x in results[1:])
            return total

    once = capture(Deep(), (torch.ones(3, 8),))
    assert_same(once, capture(Deep(), (torch.ones(3, 8),), repeats=False))


@pytest.mark.parametrize("kind", [Block, ReturnsATuple])
def test_layers_of_any_module_list_are_repeats(
    kind: Callable[[int], Block], stood_in: list[str]
) -> None:
    model = Stack(kind)
    once = capture(model, (torch.ones(3, 8),))
    assert stood_in == [f"blocks.{i}" for i in range(1, LAYERS)]
    assert_same(once, capture(model, (torch.ones(3, 8),), repeats=False))


def test_a_layer_that_reads_its_number_stands_for_no_other(stood_in: list[str]) -> None:
    step = capture(Stack(ReadsItsNumber), (torch.ones(3, 8),))
    assert not stood_in
    doubled = [op for op in step.ops if op.signature == "aten.mul.Tensor(float32[3, 8], 2)"]
    assert len(doubled) >= LAYERS // 2


@pytest.mark.parametrize("kind", [partial(TakesTheLast, kept=[]), OneUnused, ReturnsAPart])
def test_what_only_the_whole_step_shows_leads_to_a_full_record(
    kind: Callable[[int], Block], stood_in: list[str]
) -> None:
    model = Stack(kind)
    once = capture(model, (torch.ones(3, 8),))
    assert stood_in
    assert_same(once, capture(model, (torch.ones(3, 8),), repeats=False))


def test_a_full_record_for_a_gpu_enters_its_modes_anew() -> None:
    step = capture(Stack(OneUnused), (torch.ones(3, 8),), modes=cuda_modes)
    assert len([op for op in step.ops if op.name == "aten.tanh.default"]) == LAYERS


def test_layers_that_share_weights_or_have_hooks_are_run(stood_in: list[str]) -> None:
    tied = Stack()
    for block in tied.blocks:
        block.linear.weight = tied.blocks[0].linear.weight  # type: ignore[union-attr]
    hooked = Stack()
    for block in hooked.blocks:
        block.register_forward_hook(lambda module, args, out: out * 1)
    for model in (tied, hooked):
        capture(model, (torch.ones(3, 8),))
    assert not stood_in


def test_attention_weights_that_are_asked_for_are_those_of_every_layer(
    make: Callable[..., Any],
) -> None:
    model, batch = make("llama", 0.0, LAYERS, "eager")
    batch["output_attentions"] = True
    once = capture(model, batch, keep_outputs=True)
    assert_same(once, capture(model, batch, keep_outputs=True, repeats=False))
