"""Regions that keep some saved tensors and recompute the others: same bits, nothing left behind."""

import copy
import gc
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.integrations import apply
from memfit.integrations.forwards import MemfitWarning
from memfit.integrations.replay import Replay
from memfit.integrations.selective import SelectiveForward
from memfit.planner import Plan, plan
from memfit.planner.capture import capture
from memfit.planner.regions import find_regions
from memfit.planner.selective import region_program

Gradients = Callable[..., dict[str, torch.Tensor]]
_scale = 2.0


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts ops by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Region(nn.Module):
    """Runs a function on its input and a parameter."""

    def __init__(self, function: Callable[..., Any], size: int = 8) -> None:
        super().__init__()
        self.function = [function]
        self.weight = nn.Parameter(torch.linspace(-1, 1, size * size).reshape(size, size))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function[0](self, x)


def chain(m: Any, x: torch.Tensor) -> Any:
    return torch.tanh(torch.sin(x @ m.weight).exp() * 0.5) @ m.weight


def shadow(module: nn.Module, *keep: str) -> SelectiveForward:
    forward = SelectiveForward(module, None, keep)
    module.__dict__["forward"] = forward
    return forward


def replays(forward: SelectiveForward) -> list[Replay | None]:
    return list(forward._programs.values())


def names_of(forward: SelectiveForward) -> list[str]:
    replay = replays(forward)[0]
    assert replay is not None
    program = replay.recorded.program
    return [program.names[s] for s in program.droppable]


def an_input(size: int = 8, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(4, size, requires_grad=True)


def step(module: nn.Module, x: torch.Tensor | None = None) -> list[torch.Tensor]:
    x = an_input() if x is None else x
    x.grad = None
    module.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    out = module(x)
    out.sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in module.parameters())]
    return [t.clone() for t in found if t is not None]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(torch.equal, a, b))


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -- models ------------------------------------------------------------------------------------


def selective_plan(p: Plan, keep: Callable[[str], tuple[str, ...]]) -> Plan:
    regions = tuple(
        r if r.kept_because else replace(r, action="selective", keep=keep(r.name))
        for r in p.regions
    )
    return replace(p, regions=regions)


def droppable(model: nn.Module, batch: Any) -> dict[str, tuple[str, ...]]:
    """The names that the planner has for what its regions save."""
    graph = capture(model, batch)
    nodes = graph.nodes
    found = {}
    for region in find_regions(graph):
        if (program := region_program(graph, region, nodes)) is not None:
            found[region.name] = program.names(program.program.droppable)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_gradients_are_bitwise_those_of_the_model(
    name: str, attention: str, make: Callable[..., Any], gradients: Gradients
) -> None:
    model, batch = make(name, layers=2, attention=attention)
    for module in model.modules():
        if hasattr(module, "config"):  # apply() keeps caches out
            module.config.use_cache = False
    expected = gradients(model, batch)
    names = droppable(model, batch)
    assert len(names) >= 2
    chance = random.Random(0)
    for share in (0.0, 0.3, 0.7, 1.0):
        for region, all_ in names.items():
            kept = (n for n in all_ if chance.random() < share)
            shadow(model.get_submodule(region), *kept)
        with warnings.catch_warnings():
            # A mask that is drawn behind another one without a pack between cannot be drawn again.
            warnings.filterwarnings("ignore", ".* against the plan", MemfitWarning)
            for _ in ("recorded", "replayed"):
                assert equal(gradients(model, batch), expected)
        for region, all_ in names.items():
            forward = model.get_submodule(region).__dict__["forward"]
            # The executor finds the very program that the planner found.
            assert tuple(names_of(forward)) == all_
            assert len(replays(forward)) == 1
            forward.restore(model.get_submodule(region))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_autocast(name: str, make: Callable[..., Any], gradients: Gradients) -> None:
    model, batch = make(name, layers=2)

    def run(enabled: bool) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return gradients(model, batch)

    expected = [run(True), run(False)]
    model.config.use_cache = False
    blocks = model.bert.encoder.layer if name == "bert" else model.transformer.h
    forwards = [shadow(block) for block in blocks]
    for _ in range(2):
        assert equal(run(True), expected[0])
        assert equal(run(False), expected[1])
    assert all(len(replays(f)) == 2 for f in forwards)


def test_hooks_of_modules_fire_once_and_copies_work(
    make: Callable[..., Any], gradients: Gradients
) -> None:
    model, batch = make("bert", layers=2)
    p = plan(model, 1 << 40, batch)
    expected = gradients(model, batch)
    applied = apply(selective_plan(p, lambda _: ()), model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    calls: list[str] = []
    hook = model.bert.encoder.layer[1].attention.register_forward_hook(lambda *_: calls.append(""))
    for _ in range(3):
        assert equal(gradients(model, batch), expected)
    assert len(calls) == 3
    hook.remove()
    for twin in twins:
        for _ in range(2):
            assert equal(gradients(twin, batch), expected)
        layer = twin.bert.encoder.layer[0]
        assert layer.__dict__["forward"]._own() is layer
    applied.remove()
    assert not any("forward" in m.__dict__ for m in model.modules())


# -- what is kept, and what runs again ----------------------------------------------------------


def test_only_what_is_missing_runs_again() -> None:
    region = Region(chain)
    expected = step(region)
    forward = shadow(region)
    step(region)
    assert names_of(forward) == ["mm", "exp", "tanh"]
    for keep in [(), ("exp",), tuple(names_of(forward))]:
        forward = shadow(region, *keep)
        for _ in range(2):
            with Count() as ops:
                assert equal(step(region), expected)
        again = ops.names.count("aten.sin.default") - 1
        assert again == (0 if "exp" in keep else 1)
        # Backward: two for each product; forward: two; the first is run again unless kept.
        assert ops.names.count("aten.mm.default") == 6 + ("mm" not in keep)


@pytest.mark.parametrize("kept", [(), ("dropout",), ("dropout#2",), ("dropout", "dropout#2")])
@pytest.mark.parametrize("native", [False, True])
def test_masks_are_drawn_as_they_were(kept: tuple[str, ...], native: bool) -> None:
    def drop(m: Any, x: torch.Tensor) -> Any:
        def once(y: torch.Tensor) -> Any:
            if native:
                return torch.native_dropout(y, 0.5, True)[0]
            return F.dropout(y, 0.5)

        x = once((x @ m.weight).sin()).cos()
        return once((x @ m.weight).sin()).cos() * torch.rand_like(x)

    region = Region(drop)
    expected = step(region)
    after = torch.rand(3)
    wanted = "native_dropout" if native else "bernoulli"
    masks = tuple(n.replace("dropout", wanted) for n in kept)
    if native:
        masks += tuple(f"{n}[1]" for n in masks)
    forward = shadow(region, *masks)
    for _ in range(3):
        assert equal(step(region), expected)
        assert torch.equal(torch.rand(3), after)
    assert set(masks) <= set(names_of(forward)) or native


def test_what_is_changed_in_place_is_made_anew() -> None:
    def in_place(m: Any, x: torch.Tensor) -> Any:
        y = (x @ m.weight).relu_()
        z = torch.empty_like(y).normal_().mul_(0.1)
        y = y * z
        y = y.view(2, 2, -1).transpose(0, 1).sin()
        y += 1.0
        return (y * y).reshape(4, -1).sigmoid_()

    region = Region(in_place)
    expected = step(region)
    for keep in [(), ("relu",), ("normal",), ("mul#2", "sin"), ("add", "sigmoid")]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MemfitWarning)
            shadow(region, *keep)
            for _ in range(2):
                assert equal(step(region), expected)


def test_arguments_in_one_storage() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
            return ((a[:, 1:] * b[:, 1:]).sin() * (a.t() @ b).exp().sum()).tanh()

    region = Two()
    forward = shadow(region)
    for start in (4, 0, 2, 4, 0, 2):
        found = []
        for run in (Two(), region):
            base = torch.linspace(0, 1, 40).reshape(4, 10).requires_grad_()
            whole = base * 1.0
            run(whole[:, :4], whole[:, start : start + 4]).sum().backward()
            found.append([base.grad])
        assert equal(*found)
    assert len(replays(forward)) == 3


def test_backward_again_and_of_the_backward() -> None:
    region = Region(chain)

    def twice(module: nn.Module) -> list[torch.Tensor]:
        x = an_input()
        out = module(x).sum()
        out.backward(retain_graph=True)
        out.backward(retain_graph=True)
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, *module.parameters()])
        grad = x.grad
        assert grad is not None
        return [grad.clone(), first.detach(), *second]

    expected = twice(region)
    for keep in [(), ("exp",), ("sin", "tanh")]:
        shadow(region, *keep)
        for _ in range(2):
            assert equal(twice(region), expected)


def test_forwards_in_between_and_varying_shapes() -> None:
    region, plain = Region(chain), Region(chain)
    forward = shadow(region, "exp")

    def both(module: nn.Module, rows: int) -> list[torch.Tensor]:
        a, b = (torch.full((rows, 8), v, requires_grad=True) for v in (0.1, 0.2))
        module.zero_grad()
        one, two = module(a), module(b)
        with torch.no_grad():
            module(a)
        module.eval()(a)
        module.train()
        one.sum().backward()
        (two * 2).sum().backward()
        return [g.grad for g in (a, b, *module.parameters()) if g.grad is not None]

    for rows in (2, 3, 2, 3):
        assert equal(both(region, rows), both(plain, rows))
    assert len(replays(forward)) == 4


def test_gradients_taken_inside_of_the_forward() -> None:
    def inner(m: Any, x: torch.Tensor) -> Any:
        y = (x @ m.weight).sin().exp()
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y * g

    region = Region(inner)
    expected = step(region)
    shadow(region)
    for _ in range(3):
        assert equal(step(region), expected)


# -- what raises --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["weight", "input", "saved"])
@pytest.mark.parametrize("keep", [(), ("mm", "sin", "exp", "tanh")])
def test_changes_between_forward_and_backward_raise(which: str, keep: tuple[str, ...]) -> None:
    def bad(m: Any, x: torch.Tensor) -> Any:
        y = chain(m, x).exp()
        if which == "saved":
            y += 1
        return y

    region = Region(bad)
    forward = shadow(region, *keep)
    for _ in range(2):
        x = an_input()
        out = region(x)
        with torch.no_grad():
            if which != "saved":
                (x if which == "input" else region.weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    assert replays(forward) != [None]


def test_a_region_that_changes_its_input() -> None:
    def shift(m: Any, x: torch.Tensor) -> Any:
        x.mul_(2.0)
        return (x @ m.weight).sin().exp()

    region = Region(shift)

    def run() -> list[torch.Tensor]:
        x = an_input()
        (region(x * 1.0)).sum().backward()
        found = [x.grad, region.weight.grad]
        region.weight.grad = None
        return [g for g in found if g is not None]

    expected = run()
    shadow(region)
    assert equal(run(), expected) and equal(run(), expected)


def test_an_attribute_that_changes_is_noticed() -> None:
    def scaled(m: Any, x: torch.Tensor) -> Any:
        return ((x @ m.weight) * m.scale).sin()

    region = Region(scaled)
    forward = shadow(region)
    for scale in (1.0, 2.0, 1.0, 2.0):
        region.scale = scale  # type: ignore[assignment]
        found = step(region)
        del region.__dict__["forward"]
        assert equal(found, step(region))
        region.__dict__["forward"] = forward
    assert len(replays(forward)) == 2


def test_a_global_that_changes_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(m: Any, x: torch.Tensor) -> Any:
        return ((x @ m.weight) * _scale).sin().view(2, -1)[:, ::3].cos().exp()

    region = Region(scaled)
    shadow(region)
    step(region)
    step(region)
    monkeypatch.setitem(globals(), "_scale", 3.0)
    with pytest.raises(RuntimeError, match="of Region, recomputed for the backward"):
        step(region)


def test_a_mask_proves_nothing_of_what_it_has_the_shape_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    region = Region(lambda m, x: x + F.dropout(((x @ m.weight) * _scale).sin() @ m.weight, 0.5))
    forward = shadow(region)
    step(region)
    with Count() as counted:
        step(region)
    assert counted.names.count("aten.mm.default") == 2 + 1 + 4, "the mask needs no product"
    monkeypatch.setitem(globals(), "_scale", 3.0)
    with pytest.raises(RuntimeError, match="of Region, recomputed for the backward"):
        step(region)
    assert "bernoulli" in names_of(forward)


def test_parameters_that_are_replaced_before_the_backward_raise() -> None:
    region = Region(chain)
    shadow(region)
    step(region)
    for replacement in (nn.Parameter(torch.zeros(8, 8)), None):
        out = region(an_input())
        if replacement is not None:
            region.weight = replacement
        else:
            region.weight.data = torch.zeros(8, 8)
        with pytest.raises(RuntimeError, match="was replaced between the forward"):
            out.sum().backward()


def test_parameters_in_one_storage_are_told_apart() -> None:
    region = Region(lambda m, x: torch.sin(x @ m.other.t()).exp() + 0 * m.weight.sum())
    flat = torch.linspace(-1, 1, 128)
    region.weight = nn.Parameter(flat[:64].view(8, 8))
    region.other = nn.Parameter(flat[64:].view(8, 8))
    shadow(region)
    step(region)
    out = region(an_input())
    with torch.no_grad():
        region.other.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_interrupted_recomputation_leaves_the_generator_as_it_was() -> None:
    class Interrupt(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "bernoulli" in str(func):
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    region = Region(lambda m, x: F.dropout(x @ m.weight, 0.5).sin().exp())
    shadow(region)
    step(region)
    out = region(an_input())
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), Interrupt():  # type: ignore[no-untyped-call]
        out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_probe_takes_nan_for_nan() -> None:
    region = Region(lambda m, x: (x @ m.weight).log().exp().sin())
    with torch.no_grad():
        region.weight.fill_(-1)
    shadow(region)
    for _ in range(2):
        region(torch.ones(4, 8, requires_grad=True)).sum().backward()
