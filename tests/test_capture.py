"""The captured step: what it holds, that it is eager's, and that capturing leaves no trace."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import nn

from benchmarks.training import checkpoint_layers
from memfit.planner.capture import capture
from memfit.planner.errors import CaptureError
from memfit.planner.optimizers import optimizer_factory
from memfit.planner.regions import find_regions
from memfit.planner.step_graph import Kind, Phase

GOLDEN = Path(__file__).parent / "golden" / "two_layers.txt"


class TwoLayers(nn.Module):
    """y = W2 dropout(gelu(W1 x)), loss = mean(y^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16, bias=False)
        self.second = nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = nn.functional.dropout(nn.functional.gelu(self.first(x)), 0.5, self.training)
        return {"loss": self.second(hidden).square().mean()}


def test_graph_reads_as_the_golden_file() -> None:
    step = capture(TwoLayers(), {"x": torch.zeros(2, 8)})
    assert step.format() == GOLDEN.read_text()
    assert step.nodes.keys() == set(range(len(step.ops)))
    step.nodes[0].graph.lint()
    backward = next(n for n in step.nodes.values() if "gelu_backward" in str(n.target))
    gradient: Any = backward.args[1]
    assert str(gradient.target) == "aten.mm.default", "saved tensors keep their node"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_saved_tensors_are_those_of_eager_autograd(
    name: str, attention: str, make: Callable[..., Any]
) -> None:
    model, batch = make(name, attention=attention)
    step = capture(model, batch)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch, **_no_cache(model))
    assert [step.storages[s.storage].size_bytes for s in step.saved] == saved


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_ops_are_those_that_eager_runs(name: str, make: Callable[..., Any]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func not in (torch.ops.aten.detach.default, torch.ops.prim.device.default):
                names.append(str(func))
            return func(*args, **kwargs or {})

    model, batch = make(name)
    step = capture(model, batch)
    with Names():  # type: ignore[no-untyped-call]
        model(**batch, **_no_cache(model)).loss.backward()
    assert [op.name for op in step.ops] == names


def test_capture_leaves_the_model_and_the_generators_as_they_were(
    make: Callable[..., Any],
) -> None:
    model, batch = make("gpt2")
    model.eval()
    hook = model.register_forward_hook(lambda *_: None)
    before = [(n, id(p), p.device, p.grad) for n, p in model.named_parameters()]
    modules = [dict(m.__dict__) for m in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    step = capture(model, batch)
    assert [(n, id(p), p.device, p.grad) for n, p in model.named_parameters()] == before
    assert [m.__dict__.keys() for m in model.modules()] == [m.keys() for m in modules]
    assert not model.training
    assert any(op.random for op in step.ops), "a model in eval mode is captured as it will train"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    hook.remove()


def test_a_model_that_changes_its_batch_does_not_change_ours() -> None:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x[:, numpy.random.randint(4)] = 0.0
            y: torch.Tensor = self.linear(x)
            return y.sum()

    x, state = torch.ones(2, 4), list(numpy.random.get_state())
    capture(Masks(), (x,))
    assert torch.equal(x, torch.ones(2, 4))
    assert numpy.array_equal(list(numpy.random.get_state())[1], state[1])


def test_parameters_on_meta_and_of_any_size_take_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.Flatten(0), nn.Linear(1 << 21, 1))
    step = capture(model, (torch.empty(2, 1 << 20, device="meta"),))
    assert step.resident_bytes() > 1 << 42


def test_tied_weights_count_once(make: Callable[..., Any]) -> None:
    model, batch = make("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    step = capture(model, batch)
    parameters = sum(s.size_bytes for s in step.storages if s.kind is Kind.PARAMETER)
    gradients = sum(s.size_bytes for s in step.storages if s.kind is Kind.GRADIENT)
    assert parameters == sum(p.numel() * 4 for p in model.parameters()) == gradients


def test_optimizer_state_is_resident_and_its_step_is_captured(make: Callable[..., Any]) -> None:
    model, batch = make("llama")
    sizes = sum(p.numel() * 4 for p in model.parameters())
    count = len(list(model.parameters()))
    step = capture(model, batch, optimizer=optimizer_factory("adamw", model, on_gpu=False))
    state = sum(s.size_bytes for s in step.storages if s.kind is Kind.OPTIMIZER)
    assert state == 2 * sizes + 4 * count  # two moments, and a step count each
    assert step.ops[-1].phase is Phase.OPTIMIZER


def test_an_optimizer_instance_keeps_its_groups(make: Callable[..., Any]) -> None:
    model, batch = make("bert")
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if "bias" in n], "momentum": 0.9},
        {"params": [p for n, p in named.items() if "bias" not in n]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    step = capture(model, batch, optimizer=optimizer_factory(optimizer, model, on_gpu=False))
    state = sum(s.size_bytes for s in step.storages if s.kind is Kind.OPTIMIZER)
    assert state == sum(p.numel() * 4 for n, p in named.items() if "bias" in n)
    assert not optimizer.state


def test_kept_outputs_live_through_the_backward(make: Callable[..., Any]) -> None:
    model, batch = make("gpt2")
    logits = 2 * 16 * 100 * 4
    ends = []
    for keep_outputs in (False, True):
        step = capture(model, batch, keep_outputs=keep_outputs)
        same = [s for s in step.storages if s.size_bytes == logits and s.kind is Kind.ACTIVATION]
        ends.append(sum(s.released == len(step.ops) for s in same))
    assert ends[1] == ends[0] + 1


def test_gradients_are_summed_in_place_unless_a_view_waits(make: Callable[..., Any]) -> None:
    """A linear layer makes the gradient of its weight as a view, here of a weight that is tied."""
    model, batch = make("t5")
    step = capture(model, batch)
    beside: dict[bool, list[int]] = {True: [], False: []}
    for index, op in enumerate(step.ops):
        if op.phase is Phase.BACKWARD and op.name == "aten.add.Tensor" and len(op.inputs) == 2:
            tied = step.storages[op.outputs[0]].size_bytes == model.shared.weight.nbytes
            beside[tied].append(sum(step.storages[s].released > index for s in op.inputs))
    assert beside[True] == [2, 1], "the head's part is a view, the sum with it is none"
    assert 1 in beside[False], "one part of a residual's gradient becomes the sum"


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: w.gather(1, torch.zeros(8, 2).long()).sum(),
        lambda w: w[torch.arange(4)].sum(),
        lambda w: w.topk(2)[0].sum(),
        lambda w: w.index_select(0, torch.arange(4)).sum(),
    ],
    ids=["gather", "index", "topk", "index_select"],
)
def test_formulas_of_autograd_write_into_the_zeros_that_they_make(loss: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 16))

        def forward(self) -> torch.Tensor:
            made: torch.Tensor = loss(self.weight)
            return made

    step = capture(Model(), ())
    size = 8 * 16 * 4
    made = [s for s in step.storages if s.size_bytes == size and not s.kind.resident]
    assert [s.kind for s in made] == [Kind.GRADIENT]
    assert any(made[0].born == i - 1 and op.written for i, op in enumerate(step.ops))


def test_kept_gradients_are_there_before_the_step_and_added_to(make: Callable[..., Any]) -> None:
    model, batch = make("gpt2")
    step = capture(model, batch, keep_gradients=True)
    kept = [s.size_bytes for s in step.storages if s.kind is Kind.KEPT_GRADIENT]
    assert sorted(kept) == sorted(p.nbytes for p in model.parameters())
    assert not any(s.kind is Kind.GRADIENT for s in step.storages)
    added = {s for op in step.ops if op.name == "aten.add_.Tensor" for s in op.written}
    assert len(added) == len(kept)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_get_no_gradient(make: Callable[..., Any]) -> None:
    model, batch = make("vit")
    model.vit.requires_grad_(False)
    step = capture(model, batch)
    gradients = sum(s.size_bytes for s in step.storages if s.kind is Kind.GRADIENT)
    assert gradients == sum(p.numel() * 4 for p in model.classifier.parameters())


def test_a_frozen_vision_tower_saves_nothing() -> None:
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            num_hidden_layers=3, image_size=32, patch_size=8, **small
        ),
        text_config=transformers.LlamaConfig(num_hidden_layers=2, vocab_size=100, **small),
        image_token_index=99,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)
    ids = torch.arange(48).reshape(2, 24)
    ids[:, :16] = 99
    batch = {"input_ids": ids, "labels": ids, "pixel_values": torch.ones(2, 3, 32, 32)}
    step = capture(model, batch)
    saved = {call.module: len(call.saved) for call in step.calls}
    assert saved["model.vision_tower"] == 0 < saved["model.multi_modal_projector"]
    assert not any(r.name.startswith("model.vision_tower") for r in find_regions(step))


def test_a_refused_batch_says_so_once_with_its_shapes(make: Callable[..., Any]) -> None:
    model, batch = make("bert")
    batch["attention_mask"] = torch.tensor([[1] * 6 + [0]] * 3)
    with pytest.raises(CaptureError, match=r"refused the batch \(input_ids int64\[2, 16\], .*7\]"):
        capture(model, batch)


def test_a_value_that_depends_on_activations_names_the_module() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 1), Branches())
    with pytest.raises(CaptureError, match=r"Sequential cannot be captured: 1 reads a value"):
        capture(model, (torch.ones(1, 4),))


def test_checkpointing_that_is_switched_on_is_refused(make: Callable[..., Any]) -> None:
    model, batch = make("llama")
    checkpoint_layers(model)
    with pytest.raises(CaptureError, match=r"activation_checkpointing_disable\(\)"):
        capture(model, batch)


def _no_cache(model: nn.Module) -> dict[str, bool]:
    import inspect

    return (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )


def test_what_functions_cache_is_there_before_the_step() -> None:
    config = transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8, use_relative_position_bias=True,
    )  # fmt: skip
    model = transformers.BeitForImageClassification(config)
    batch = {"pixel_values": torch.ones(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    index_bytes = (4 * 4 + 1) ** 2 * 8
    found = [s.kind for s in capture(model, batch).storages if s.size_bytes == index_bytes]
    assert found == [Kind.CONSTANT], "layers share one index, which the first step ever makes"
