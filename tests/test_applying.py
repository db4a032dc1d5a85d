"""Applying a plan: same gradients, only the planned recomputation, and nothing left behind."""

import copy
import inspect
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import checkpoint_layers, keep_layers
from memfit.integrations import ApplyError, apply
from memfit.planner import InfeasibleBudget, Plan, plan
from memfit.planner.capture import capture


def tight(model: nn.Module, batch: Any) -> Plan:
    """The plan for the smallest budget."""
    with pytest.raises(InfeasibleBudget) as caught:
        plan(model, 1, batch)
    return plan(model, caught.value.minimum_bytes, batch)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_gradients_are_bitwise_those_without_a_plan(
    name: str,
    attention: str,
    dtype: torch.dtype,
    make: Callable[..., Any],
    gradients: Callable[..., Any],
) -> None:
    model, batch = make(name, attention=attention)
    model.to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    # A plan turns caches off, as transformers' own checkpointing does. A cache copies keys and
    # values, and some processors round products with the copies, which lie otherwise, otherwise.
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    expected = gradients(model, batch)
    with apply(tight(model, batch), model):
        assert equal(gradients(model, batch), expected)
        assert equal(gradients(model, batch), expected)
    assert equal(gradients(model, batch), expected)


@pytest.mark.parametrize("solver", ["full", "every_2"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_what_is_checkpointed_is_what_the_plan_says(
    name: str, solver: str, make: Callable[..., Any], gradients: Callable[..., Any]
) -> None:
    """Counted in floating point operations: unplanned ones plus those of the recomputed ops."""
    model, batch = make(name)
    p = plan(model, 1 << 50, batch, solver=solver)
    step = capture(model, batch)
    calls = {call.module: call for call in step.calls}
    expected = 0
    for region in p.regions:
        if region.action == "checkpoint":
            call = calls[region.name]
            stop = step.saved[call.saved[-1]].packed
            expected += sum(op.flops for op in step.ops[call.start : stop])
    assert expected > 0
    counts = []
    for planned in (False, True):
        handle = apply(p, model) if planned else None
        with FlopCounterMode(display=False) as counter:
            gradients(model, batch)
        counts.append(counter.get_total_flops())
        if handle:
            handle.remove()
    assert counts[1] - counts[0] == expected


def test_calls_of_a_shared_module_take_turns(gradients: Callable[..., Any]) -> None:
    config = transformers.AlbertConfig(
        vocab_size=100, embedding_size=16, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = transformers.AlbertForSequenceClassification(config)
    batch = {"input_ids": torch.arange(32).reshape(2, 16), "labels": torch.tensor([0, 1])}
    expected = gradients(model, batch)
    p = plan(model, 1 << 50, batch)
    actions = ["keep", "keep", "checkpoint", "selective", "keep"]
    regions = [replace(r, action=a) for r, a in zip(p.regions, actions, strict=True)]
    assert len({r.name for r in regions}) == 2, "embeddings, and the shared layer four times"

    def counted(planned: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            assert equal(gradients(planned, batch), expected)
        return int(counter.get_total_flops())

    def interrupt(*_: Any) -> None:
        raise KeyError("stop")

    plain = counted(model)
    with apply(replace(p, regions=tuple(regions)), model):
        counts = {counted(model), counted(copy.deepcopy(model))}
        layer = model.albert.encoder.albert_layer_groups[0]
        hook = layer.register_forward_hook(interrupt)
        with pytest.raises(KeyError):
            model(**batch)
        hook.remove()
        counts.add(counted(model))
    assert len(counts) == 1 and plain < counts.pop() < 2 * plain
    assert counted(model) == plain


def test_constants_and_unwritten_memory_are_planned_as_they_run(
    gradients: Callable[..., Any],
) -> None:
    """What the plan names is what the executor finds: a warning fails the test."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (self.up(x) * torch.tensor([2.0] * 64)).sin().exp()
            y = y * torch.full_like(y, 0.5) * torch.zeros(64).fill_(3.0)
            return x + nn.functional.dropout(self.down(y), 0.1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block() for _ in range(4)))

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=self.blocks(x).square().mean())

    model, batch = Net(), {"x": torch.ones(8, 16)}
    expected = gradients(model, batch)
    p = tight(model, batch)
    assert "selective" in {r.action for r in p.regions}
    with apply(p, model):
        for _ in range(3):
            assert equal(gradients(model, batch), expected)


def test_only_planned_modules_run_again(make: Callable[..., Any]) -> None:
    model, batch = make("gpt2")
    p = plan(model, 1 << 50, batch, solver="every_2")
    runs: Counter[str] = Counter()
    for region in p.regions:
        attention = model.get_submodule(region.name).attn
        attention.register_forward_hook(lambda *_, name=region.name: runs.update([name]))
    with apply(p, model):
        model(**batch).loss.backward()
    assert {r.action for r in p.regions} == {"keep", "checkpoint"}
    assert runs == {r.name: 1 + (r.action == "checkpoint") for r in p.regions}


def test_names_state_dict_hooks_and_signatures_stay(make: Callable[..., Any]) -> None:
    model, batch = make("bert")
    before = [*model.state_dict()], [n for n, _ in model.named_modules()]
    layer = model.bert.encoder.layer[0]
    signature, dicts = inspect.signature(layer.forward), [{**m.__dict__} for m in model.modules()]
    hooks = len(layer._forward_hooks), len(layer._forward_pre_hooks)
    handle = apply(tight(model, batch), model)
    assert ([*model.state_dict()], [n for n, _ in model.named_modules()]) == before
    assert inspect.signature(layer.forward) == signature
    assert (len(layer._forward_hooks), len(layer._forward_pre_hooks)) == hooks
    handle.remove()
    handle.remove()
    assert [m.__dict__ for m in model.modules()] == dicts


def test_a_forward_of_the_instance_is_checkpointed_and_given_back(
    make: Callable[..., Any], gradients: Callable[..., Any]
) -> None:
    """accelerate and others put a forward on the instance; a plan goes around it."""
    model, batch = make("llama")
    layer = model.model.layers[0]
    calls: list[int] = []
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    p = plan(model, 1 << 50, batch, solver="full")
    layer.forward = forward
    with apply(p, model):
        gradients(model, batch)
    assert len(calls) == 2
    assert layer.forward is forward


def test_nothing_is_recomputed_without_gradients(make: Callable[..., Any]) -> None:
    model, batch = make("vit", dropout=0.0)
    with torch.no_grad():
        expected = model(**batch).logits
        with apply(tight(model, batch), model), FlopCounterMode(display=False) as counter:
            assert torch.equal(model(**batch).logits, expected)
    assert counter.get_total_flops() > 0


def test_caches_are_off_while_gradients_are_recorded_and_on_for_generation(
    make: Callable[..., Any], gradients: Callable[..., Any]
) -> None:
    model, batch = make("llama")
    assert model.config.use_cache
    with apply(tight(model, batch), model):
        assert model(**batch).past_key_values is None
        with torch.no_grad():
            assert model(**batch).past_key_values is not None


def test_a_plan_for_another_model_is_refused_and_says_why(make: Callable[..., Any]) -> None:
    model, batch = make("bert")
    p = tight(model, batch)
    wider, _ = make("bert", layers=5)
    with pytest.raises(ApplyError, match="other parameter names, shapes or dtypes"):
        apply(p, wider)
    eager, _ = make("bert", attention="eager")
    with pytest.raises(ApplyError, match="attention implementation"):
        apply(p, eager)
    other, _ = make("vit")
    with pytest.raises(ApplyError, match="made for a BertForSequenceClassification"):
        apply(p, other)
    model.bert.embeddings.requires_grad_(False)
    with pytest.raises(ApplyError, match="requires_grad"):
        apply(p, model)
    for m in (wider, eager, other, model):
        assert not any("forward" in module.__dict__ for module in m.modules())


def test_a_plan_still_applies_after_training(
    make: Callable[..., Any], gradients: Callable[..., Any]
) -> None:
    model, batch = make("bert")
    p = tight(model, batch)
    gradients(model, batch)  # sets config.problem_type
    apply(p, model).remove()


def test_scaled_gradients_of_float16_are_kept_and_clipped_the_same(
    make: Callable[..., Any],
) -> None:
    def losses(planned: bool) -> list[float]:
        model, batch = make("llama")
        optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
        if planned:
            options: dict[str, Any] = {
                "optimizer": optimizer,
                "autocast": "float16",
                "keep_gradients": True,
            }
            with pytest.raises(InfeasibleBudget) as error:
                plan(model, 1, batch, **options)
            apply(plan(model, error.value.minimum_bytes, batch, **options), model)
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=False)
            found.append(loss.item())
        return found

    assert losses(planned=True) == losses(planned=False)


def test_a_region_that_the_model_lacks_changes_nothing(make: Callable[..., Any]) -> None:
    model, batch = make("bert")
    p = tight(model, batch)
    broken = replace(p, regions=(*p.regions, replace(p.regions[0], name="bert.encoder.layer.99")))
    with pytest.raises(ApplyError, match=r"'bert\.encoder\.layer\.99'"):
        apply(broken, model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_applying_a_plan_that_keeps_all_twice_is_refused(make: Callable[..., Any]) -> None:
    model, batch = make("bert", layers=1)
    p = plan(model, 1 << 40, batch)
    with apply(p, model), pytest.raises(ApplyError, match=r"remove\(\)"):
        apply(p, model)


def test_applying_or_planning_twice_is_refused(make: Callable[..., Any]) -> None:
    model, batch = make("bert")
    p = tight(model, batch)
    with apply(p, model):
        with pytest.raises(ApplyError, match=r"remove\(\)"):
            apply(p, model)
        with pytest.raises(RuntimeError, match=r"remove\(\)"):
            plan(model, 1 << 40, batch)
    apply(p, model).remove()


def test_checkpointing_switched_on_before_or_after_is_no_silent_change(
    make: Callable[..., Any], gradients: Callable[..., Any]
) -> None:
    model, batch = make("llama")
    p = tight(model, batch)
    expected = gradients(model, batch)
    checkpoint_layers(model)
    with pytest.raises(ApplyError, match=r"activation_checkpointing_disable\(\)"):
        apply(p, model)
    keep_layers(model)
    with apply(p, model):
        checkpoint_layers(model)
        with pytest.raises(ApplyError, match="beside the plan"):
            model(**batch)
        keep_layers(model)
        assert equal(gradients(model, batch), expected)


class Residual(nn.Module):
    """A block that transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(nn.functional.dropout(self.up(x).relu(), 0.3))
        return x + hidden * scale


class Plain(nn.Module):
    """A stack of them, called with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        scale = torch.full((16,), 0.5)
        for block in self.blocks:
            x = block(x, scale=scale)
        return type("Output", (), {"loss": x.square().mean()})()


def test_a_model_without_transformers(gradients: Callable[..., Any]) -> None:
    model, batch = Plain(), {"x": torch.randn(256, 16)}
    p = tight(model, batch)
    assert {r.action for r in p.regions} != {"keep"}
    expected = gradients(model, batch)
    with apply(p, model):
        assert equal(gradients(model, batch), expected)


def test_copies_and_pickles_of_a_planned_model_train_as_planned(
    gradients: Callable[..., Any],
) -> None:
    model, batch = Plain(), {"x": torch.randn(256, 16)}
    expected = gradients(model, batch)
    with apply(tight(model, batch), model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.zero_grad(set_to_none=True)
            with torch.no_grad():
                next(model.parameters()).add_(1.0)  # the twin must not run the original's weights
            assert equal(gradients(twin, batch), expected)
            with torch.no_grad():
                next(model.parameters()).sub_(1.0)


def test_a_planned_model_is_saved_as_it_is(
    make: Callable[..., Any], gradients: Callable[..., Any], tmp_path: Path
) -> None:
    model, batch = make("llama")
    expected, state = gradients(model, batch), model.state_dict()
    with apply(tight(model, batch), model):
        assert list(model.state_dict()) == list(state)
        model.save_pretrained(tmp_path / "model")
        torch.save(model, tmp_path / "model.pt")
    again = type(model).from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert equal(gradients(whole, batch), expected)


def test_an_exception_in_forward_leaves_nothing_behind(
    make: Callable[..., Any], gradients: Callable[..., Any]
) -> None:
    model, batch = make("gpt2")
    expected = gradients(model, batch)
    with apply(tight(model, batch), model):
        fail = model.transformer.h[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        fail.remove()
        assert equal(gradients(model, batch), expected)


def test_a_planned_model_is_freed_without_the_garbage_collector(make: Callable[..., Any]) -> None:
    import gc

    model, batch = Plain(), {"x": torch.randn(256, 16)}
    handle = apply(tight(model, batch), model)
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(next(model.parameters()))
        del model, handle
        assert weight() is None
    finally:
        gc.enable()
