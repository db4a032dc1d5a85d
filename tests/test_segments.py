"""Segments: what the planner predicts of them, and that regions are given their inputs again."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from memfit.integrations import apply
from memfit.integrations.applying import ApplyError
from memfit.integrations.forwards import MemfitWarning
from memfit.integrations.links import Relay
from memfit.planner import InfeasibleBudget, Plan, plan
from memfit.planner.report import format_plan

Gradients = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def as_planned() -> Iterator[None]:
    """A plan that is not kept to fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemfitWarning)
        yield


def least(model: nn.Module, batch: Any, solver: str = "auto") -> Plan:
    """The plan for the smallest budget."""
    with pytest.raises(InfeasibleBudget) as caught:
        plan(model, 1, batch, solver=solver, costs="roofline")
    return plan(model, caught.value.minimum_bytes, batch, solver=solver, costs="roofline")


def wide(made: tuple[Any, Any]) -> tuple[nn.Module, Any]:
    """With a batch of which activations, not parameters, make the peak."""
    model, batch = made
    return model, {
        name: value.repeat(32, *[1] * (value.dim() - 1)) for name, value in batch.items()
    }


def chained(p: Plan) -> int:
    """How many regions a region before them gives their input, and no embedding."""
    pairs = pairwise(p.regions)
    return sum(bool(region.recompute_input and before.recompute) for before, region in pairs)


def in_pairs(p: Plan) -> Plan:
    """The plan that gives every second region its input again, whatever that saves."""
    first = next(r for r in p.regions if r.recompute_input)
    regions = tuple(
        replace(
            region,
            action="selective",
            keep=(),
            recompute_input=first.recompute_input if number % 2 else (),
        )
        for number, region in enumerate(p.regions)
    )
    return replace(p, regions=regions)


@pytest.fixture
def deep(make: Callable[..., Any]) -> tuple[nn.Module, Any, Plan]:
    model, batch = wide(make("gpt2", layers=8))
    return model, batch, in_pairs(least(model, batch, solver="nested_dp"))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_gradients_are_bitwise_those_of_the_model(
    name: str, make: Callable[..., Any], gradients: Gradients
) -> None:
    model, batch = wide(make(name, layers=5))
    p = least(model, batch)
    assert chained(p)
    for module in model.modules():
        if config := getattr(module, "config", None):
            config.use_cache = False  # apply() keeps caches out
    plain = gradients(model, batch)
    for _ in range(2):
        with apply(p, model):
            for _ in ("recorded", "replayed"):
                found = gradients(model, batch)
                assert all(torch.equal(found[k], plain[k]) for k in plain)


def test_less_memory_than_any_plan_without(make: Callable[..., Any]) -> None:
    model, batch = wide(make("llama", layers=8))
    flat, nested = (least(model, batch, solver=s) for s in ("count_ilp", "nested_dp"))
    assert nested.budget_bytes < flat.budget_bytes
    assert chained(nested) and not chained(flat)
    assert nested.predicted.overhead > flat.predicted.overhead
    assert least(model, batch).budget_bytes == nested.budget_bytes
    total = sum(region.recompute_seconds for region in nested.regions)
    assert total == pytest.approx(nested.predicted.recompute_seconds)
    assert Plan.from_json(nested.to_json()) == nested


def test_more_budget_is_never_slower(make: Callable[..., Any]) -> None:
    model, batch = wide(make("llama", layers=8))
    lowest = least(model, batch).budget_bytes
    plans = [plan(model, lowest * n // 100, batch, costs="roofline") for n in (100, 103, 106, 115)]
    seconds = [p.predicted.recompute_seconds for p in plans]
    assert seconds == sorted(seconds, reverse=True)
    peaks = [p.predicted.peak_bytes for p in plans]
    assert peaks == sorted(peaks)
    assert [bool(chained(p)) for p in plans][::3] == [True, False]


def test_chen(make: Callable[..., Any]) -> None:
    model, batch = make("llama", layers=9)
    p = plan(model, "1GiB", batch, solver="sqrt_n")
    assert [bool(region.recompute_input) for region in p.regions] == [False, True, True] * 3


def test_layers_that_share_a_module(make: Callable[..., Any], gradients: Gradients) -> None:
    config = transformers.AlbertConfig(
        vocab_size=100, hidden_size=32, embedding_size=16, num_hidden_layers=6,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    batch = {"input_ids": torch.arange(32).reshape(2, 16), "labels": torch.tensor([0, 1])}
    model, batch = wide((transformers.AlbertForSequenceClassification(config), batch))
    p = least(model, batch)
    assert chained(p)
    plain = gradients(model, batch)
    with apply(p, model):
        for _ in range(3):
            found = gradients(model, batch)
            assert all(torch.equal(found[k], plain[k]) for k in plain)


# -- what the regions do -------------------------------------------------------------------------


def same(
    model: nn.Module, batch: Any, plain: dict[str, torch.Tensor], gradients: Gradients
) -> bool:
    return all(torch.equal(value, plain[key]) for key, value in gradients(model, batch).items())


def test_inputs_are_not_held_and_nothing_stays(
    deep: tuple[nn.Module, Any, Plan], gradients: Gradients
) -> None:
    model, batch, p = deep
    held: list[weakref.ref[torch.UntypedStorage]] = []

    def watch(_: Any, args: tuple[torch.Tensor, ...], __: Any) -> None:
        held.append(weakref.ref(args[0].untyped_storage()))

    hooks = [model.get_submodule(r.name).register_forward_hook(watch) for r in p.regions]
    gc.collect()
    gc.disable()
    try:
        with apply(p, model):
            gradients(model, batch)
            held.clear()
            loss = model(**batch).loss
            alive = [reference() is not None for reference in held]
            assert alive[1:-1:2] == [False] * len(alive[1:-1:2])
            assert alive[::2] == [True] * len(alive[::2])
            loss.backward()
            del loss
            assert all(reference() is None for reference in held)
            loss = model(**batch).loss
            del loss
            assert all(reference() is None for reference in held)
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()


def test_backward_again_and_in_parts(
    deep: tuple[nn.Module, Any, Plan], gradients: Gradients
) -> None:
    model, batch, p = deep
    torch.manual_seed(0)
    plain = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
    with apply(p, model):
        for _ in range(2):
            torch.manual_seed(0)
            loss = model(**batch).loss
            for _ in range(2):
                found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                assert all(map(torch.equal, found, plain))
            first = torch.autograd.grad(loss, next(model.parameters()))
            assert torch.equal(first[0], plain[0])


def test_forwards_in_between(deep: tuple[nn.Module, Any, Plan], gradients: Gradients) -> None:
    model, batch, p = deep
    plain = gradients(model, batch)
    with apply(p, model):
        gradients(model, batch)
        torch.manual_seed(0)
        model.zero_grad()
        kept = model(**batch).loss
        with torch.no_grad():
            model(**batch)
        other = model(**{k: v[:1, :8] for k, v in batch.items()}).loss
        other.backward()
        assert same(model, batch, plain, gradients)
        kept.backward()


def test_copies_and_pickles_are_linked_among_themselves(
    deep: tuple[nn.Module, Any, Plan], gradients: Gradients
) -> None:
    model, batch, p = deep
    plain = gradients(model, batch)
    with apply(p, model):
        gradients(model, batch)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for _ in range(2):
                assert same(again, batch, plain, gradients)
        assert same(model, batch, plain, gradients)
    assert same(model, batch, plain, gradients)


def test_an_input_from_elsewhere_is_held(
    deep: tuple[nn.Module, Any, Plan], gradients: Gradients
) -> None:
    model, batch, p = deep
    plain = gradients(model, batch)
    name = p.regions[3].name

    def replaced(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].clone(), *args[1:])

    with apply(p, model), pytest.warns(MemfitWarning, match=f"{name} holds its input against"):
        hook = model.get_submodule(name).register_forward_pre_hook(replaced)
        for _ in range(2):
            assert same(model, batch, plain, gradients)
        hook.remove()
        assert same(model, batch, plain, gradients)


def test_an_input_that_was_changed_in_place_is_held(
    deep: tuple[nn.Module, Any, Plan], gradients: Gradients
) -> None:
    model, batch, p = deep

    def doubled(_: Any, __: Any, out: torch.Tensor) -> None:
        (out if isinstance(out, torch.Tensor) else out[0]).mul_(2)

    hook = model.get_submodule(p.regions[2].name).register_forward_hook(doubled)
    plain = gradients(model, batch)
    with apply(p, model), pytest.warns(MemfitWarning, match="holds its input against"):
        for _ in range(2):
            assert same(model, batch, plain, gradients)
    hook.remove()


def test_what_changes_before_the_backward_raises(deep: tuple[nn.Module, Any, Plan]) -> None:
    model, batch, p = deep
    with apply(p, model):
        for _ in range(2):
            loss = model(**batch).loss
            with torch.no_grad():
                next(model.get_submodule(p.regions[2].name).parameters()).add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace"):
                loss.backward()


def test_an_error_in_a_forward_leaves_nothing(
    deep: tuple[nn.Module, Any, Plan], gradients: Gradients
) -> None:
    model, batch, p = deep
    plain = gradients(model, batch)

    def fail(*_: Any) -> None:
        raise KeyError("no")

    with apply(p, model):
        gradients(model, batch)
        hook = model.get_submodule(p.regions[3].name).register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(**batch)
        hook.remove()
        assert same(model, batch, plain, gradients)


def test_a_plan_that_chains_to_a_whole_region_is_refused(
    deep: tuple[nn.Module, Any, Plan],
) -> None:
    model, _, p = deep
    regions = [replace(p.regions[0], action="checkpoint"), *p.regions[1:]]
    with pytest.raises(ApplyError, match=f"{p.regions[0].name} make the input of the region after"):
        apply(replace(p, regions=tuple(regions)), model)
    with pytest.raises(ApplyError, match="no region before"):
        apply(replace(p, regions=p.regions[1:]), model)
    assert "forward" not in model.get_submodule(p.regions[1].name).__dict__


def test_a_relay_forgets_what_is_gone() -> None:
    relay, tensor = Relay(), torch.ones(3)
    relay.leave(tensor, None)  # type: ignore[arg-type]
    assert relay._left
    del tensor
    assert not relay._left


def test_an_embedding_makes_the_first_input_again(
    make: Callable[..., Any], gradients: Gradients
) -> None:
    model, batch = wide(make("llama", layers=3))
    p = least(model, batch, solver="count_ilp")
    lead, first = p.regions[:2]
    assert (lead.name, lead.keep, lead.stored_bytes) == ("model.embed_tokens", (), 0)
    assert (first.name, first.recompute_input) == ("model.layers.0", ("embedding",))
    assert f"input: made again by the region before ({first.recompute_input[0]})" in format_plan(p)
    plain = gradients(model, batch)
    with apply(p, model):
        for _ in range(2):
            assert same(model, batch, plain, gradients)
    held = plan(model, p.budget_bytes * 2, batch, costs="roofline", solver="full")
    assert "model.embed_tokens" not in [region.name for region in held.regions]


def test_what_needs_more_than_ids_makes_no_input_again(make: Callable[..., Any]) -> None:
    model, batch = wide(make("gpt2", layers=3))  # it adds positions, and drops some
    p = least(model, batch, solver="count_ilp")
    assert not chained(p)
