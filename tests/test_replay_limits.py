"""When a selective region keeps everything after all, and that nothing of it stays alive."""

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from memfit.integrations.forwards import MemfitWarning
from tests.test_replay import Region, an_input, chain, equal, no_collector, replays, shadow, step

Gradients = Callable[..., dict[str, torch.Tensor]]

# -- what keeps everything ----------------------------------------------------------------------


def test_shapes_that_depend_on_values_keep_everything() -> None:
    def route(m: Any, x: torch.Tensor) -> Any:
        rows = (x[:, 0] > 0).nonzero().flatten()
        return x.index_add(0, rows, (x[rows] @ m.weight).sin())

    region = Region(route)
    xs = [an_input(seed=s) for s in range(4)]
    expected = [step(region, x) for x in xs]
    forward = shadow(region)
    with pytest.warns(MemfitWarning, match="Region keeps everything: .*nonzero") as caught:
        assert equal(step(region, xs[0]), expected[0])
        assert equal(step(region, xs[1]), expected[1])
    assert len(caught) == 1 and replays(forward) == [None]


def test_a_choice_that_cannot_be_repeated_is_kept() -> None:
    def route(m: Any, x: torch.Tensor) -> Any:
        weights, chosen = (x @ m.weight).softmax(-1).topk(2)
        return x.gather(1, chosen).sin() * weights

    region = Region(route)
    expected = step(region)
    shadow(region)
    with pytest.warns(MemfitWarning, match=r"keeps topk.* against the plan"):
        assert equal(step(region), expected)
    assert equal(step(region), expected)


def test_names_that_are_unknown_are_told_once() -> None:
    region = Region(chain)
    shadow(region, "nowhere", "exp")
    with pytest.warns(MemfitWarning, match="Region has no nowhere"):
        step(region)
    step(region)


def test_forwards_that_are_not_as_recorded_keep_everything() -> None:
    turn = [0]

    def unsteady(m: Any, x: torch.Tensor) -> Any:
        turn[0] += 1
        x = (x @ m.weight).sin()
        for _ in range(turn[0] // 2 % 2):
            x = x.exp()
        return x.cos()

    region, plain = Region(unsteady), Region(unsteady)
    forward = shadow(region, "sin")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            found = []
            for module in (plain, region):
                before = list(turn)
                found.append(step(module))
                turn[:] = before
            turn[0] += 1
            assert equal(*found)
    assert [str(w.message) for w in caught if "did not save" in str(w.message)]
    assert len([w for w in caught if w.category is MemfitWarning]) == 1
    assert forward._mismatches == 3


def test_arguments_that_hide_tensors_keep_everything() -> None:
    class Opaque:
        tensor = torch.ones(8)

    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, other: Opaque) -> Any:
            return (x * other.tensor).sin()

    region = Takes()
    forward = shadow(region)
    with pytest.warns(MemfitWarning, match="Takes keeps everything: it is given a Opaque"):
        region(an_input(), Opaque()).sum().backward()
    assert not replays(forward)


def test_sparse_tensors_keep_everything() -> None:
    graph = torch.eye(4).to_sparse()
    region = Region(lambda m, x: torch.sparse.mm(graph, x @ m.weight).sin().exp())
    expected = step(region)
    forward = shadow(region)
    with pytest.warns(MemfitWarning, match="Region keeps everything: it works on sparse tensors"):
        assert equal(step(region), expected)
    assert equal(step(region), expected) and replays(forward) == [None]


def test_memory_that_no_op_fills_is_kept() -> None:
    def fill(m: Any, x: torch.Tensor) -> Any:
        factors = torch.empty(4, 8)
        factors.numpy()[:] = 2.0
        return ((x @ m.weight) * factors).sin()

    region = Region(fill)
    expected = step(region)
    shadow(region)
    with pytest.warns(MemfitWarning, match=r"keeps empty.* against the plan"):
        assert equal(step(region), expected)
    assert equal(step(region), expected)


def test_a_forward_that_is_left_early_keeps_what_it_saved() -> None:
    class Leave(Exception):
        pass

    held: list[torch.Tensor] = []

    def leave(m: Any, x: torch.Tensor) -> Any:
        y = (x @ m.weight).sin().exp()
        held.append(y)
        if len(held) > 2:
            raise Leave
        return y.cos()

    region = Region(leave)
    shadow(region)
    step(region)
    step(region)
    with pytest.raises(Leave):
        region(an_input())
    held[-1].sum().backward()  # type: ignore[no-untyped-call]


def test_another_thread_runs_as_it_is_while_one_records() -> None:
    region = Region(chain)
    region.inner = nn.Identity()
    inside, go_on = threading.Event(), threading.Event()

    def waiting(m: Any, x: torch.Tensor) -> Any:
        x = m.inner(x)
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(10)
        return chain(m, x)

    region.function = [waiting]
    expected = [g.clone() for g in torch.autograd.grad(region(an_input()).sum(), region.weight)]
    forward = shadow(region)
    found: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: found.extend(
            torch.autograd.grad(region(torch.ones(4, 8)).sum(), region.weight)
        )
    )
    thread.start()
    assert inside.wait(10)
    assert equal(torch.autograd.grad(region(an_input()).sum(), region.weight), expected)
    assert not replays(forward)
    go_on.set()
    thread.join(10)
    assert len(found) == 1 and len(replays(forward)) == 1


def test_functions_are_told_by_their_code_and_closures_keep_everything() -> None:
    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, f: Callable[..., Any]) -> Any:
            return f(x).sin()

    region = Takes()
    forward = shadow(region)
    for _ in range(3):
        region(an_input(), lambda x: x.exp()).sum().backward()
    assert len(replays(forward)) == 1
    hidden = torch.ones(8)
    with pytest.warns(MemfitWarning, match="it is given a function"):
        region(an_input(), lambda x: x * hidden).sum().backward()
    assert len(replays(forward)) == 1


# -- memory -------------------------------------------------------------------------------------


def test_what_is_dropped_is_gone_after_the_forward() -> None:
    alive: list[weakref.ref[Any]] = []

    def watched(m: Any, x: torch.Tensor) -> Any:
        y = (x @ m.weight).sin()
        z = (y * y).exp()
        alive[:] = [weakref.ref(t.untyped_storage()) for t in (y, z)]
        return z.cos()

    region = Region(watched)
    shadow(region, "exp")
    with no_collector():
        for _ in range(3):  # the recording forward keeps to the plan, too
            out = region(an_input())
            assert [r() is not None for r in alive] == [False, True]
            out.sum().backward()
            del out
            assert [r() is not None for r in alive] == [False, False]


def test_nothing_is_left_after_steps_or_an_error() -> None:
    fail = [False]

    def maybe(m: Any, x: torch.Tensor) -> Any:
        y = F.dropout(chain(m, x), 0.5).exp()
        if fail[0]:
            raise KeyError("stop")
        return y * y

    region = Region(maybe)
    with no_collector():
        shadow(region, "exp")
        for _ in range(2):
            step(region)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for turn in range(20):
                fail[0] = turn % 4 == 3
                try:
                    region(an_input()).sum().backward(inputs=[region.weight])
                except KeyError:
                    pass
                region.weight.grad = None
        session = profiler.profiler
        assert session is not None and session.kineto_results is not None
        events = [e for e in session.kineto_results.events() if e.name() == "[memory]"]
        assert events and sum(e.nbytes() for e in events) == 0


def test_a_recording_that_fails_leaves_nothing() -> None:
    alive: list[weakref.ref[Any]] = []

    def fails(m: Any, x: torch.Tensor) -> Any:
        y = (x @ m.weight).sin().exp()
        alive.append(weakref.ref(y.untyped_storage()))
        raise KeyError("stop")

    region = Region(fails)
    region.inner = nn.Linear(2, 2)
    forward = shadow(region)
    with no_collector():
        for _ in range(2):
            with pytest.raises(KeyError):
                region(an_input())
        assert not any(r() for r in alive)
        assert not region.inner._forward_hooks and not replays(forward)


def test_a_model_is_freed_with_its_forward() -> None:
    region = Region(chain)
    shadow(region, "exp")
    gone = weakref.ref(region)
    step(region)
    step(region)
    with no_collector():
        del region
        assert gone() is None


def test_a_compiled_model_runs_its_regions_as_they_are() -> None:
    region = Region(chain)
    expected = step(region)
    model = nn.Sequential(nn.Identity(), region)
    forward = shadow(region, "exp")
    model.compile(backend="aot_eager")
    for _ in range(2):
        with pytest.warns(MemfitWarning, match="a planned model is compiled: .* run uncompiled"):
            assert equal(step(model), expected)
    (replay,) = replays(forward)
    assert replay is not None and replay.dropped


def test_frozen_parameters_are_kept_whatever_their_version() -> None:
    region = Region(lambda m, x: torch.sin(x @ m.weight).exp() @ m.weight)
    region.weight = nn.Parameter(torch.linspace(-1, 1, 64).reshape(8, 8), requires_grad=False)
    assert region.weight._version == 0
    plain = step(region)
    shadow(region)
    for _ in range(3):
        assert equal(step(region), plain)
    with torch.no_grad():
        region.weight.add_(0)
    assert equal(step(region), plain)


def test_kept_tensors_make_no_cycles_whichever_node_saves_them() -> None:
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            out = x.exp()
            ctx.save_for_backward(x, out)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            grad: torch.Tensor = grads[0] * ctx.saved_tensors[1]
            return grad

    def forward(m: Any, x: torch.Tensor) -> Any:
        e = (x @ m.weight).sin().exp()
        y = torch.softmax(e, -1)
        y = F.scaled_dot_product_attention(y[None], y[None], y[None])[0]
        n = y.norm(dim=-1, keepdim=True)
        made[:] = [weakref.ref(t.untyped_storage()) for t in (e, y, n)]
        y = y / n
        return (Both.apply(y) * 2).add_(1).cos() @ m.weight  # type: ignore[no-untyped-call]

    made: list[Any] = []
    region = Region(forward)
    names = shadow(region)
    step(region)
    program = next(r.recorded.program for r in replays(names) if r is not None)
    keep = tuple(program.names[s] for s in program.droppable)
    for kept in (keep, keep[::2], ()):
        region = Region(forward)
        plain = step(region)
        shadow(region, *kept)
        assert equal(step(region), plain)
        with no_collector():
            out = region(an_input())
            assert kept != keep or all(ref() is not None for ref in made)
            del out
            assert [ref() for ref in made] == [None] * 3, "gone without the collector"
