"""Each shim over a private or surprising part of torch and transformers does what it says."""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.utils.import_utils as import_utils
from torch import nn

from memfit.planner import _compat
from memfit.planner.budget import BudgetError
from memfit.planner.flops import flops_of
from memfit.planner.target import find_target, free_bytes


def test_storage_keys_tell_storages_apart_and_views_not() -> None:
    with _compat.FakeTensorMode():
        a, b = torch.zeros(4), torch.zeros(4)
        assert _compat.storage_key(a) == _compat.storage_key(a[1:])
        assert _compat.storage_key(a) != _compat.storage_key(b)


def test_a_new_fake_has_strides_and_its_own_storage() -> None:
    mode = _compat.FakeTensorMode()
    like = torch.empty(4, 6, device="meta").t()
    fake = _compat.new_fake(mode, like, torch.device("cpu"))
    assert isinstance(fake, _compat.FakeTensor)
    assert (fake.shape, fake.stride(), fake.device.type) == (like.shape, like.stride(), "cpu")
    assert fake.untyped_storage().nbytes() == 96
    other = _compat.another_fake(fake)
    assert (other.shape, other.stride(), other.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert _compat.storage_key(other) != _compat.storage_key(fake)
    with mode:
        assert (fake + other).device.type == "cpu"


@pytest.mark.parametrize("trains", [True, False])
def test_a_fake_becomes_a_parameter(trains: bool) -> None:
    like = torch.empty(2, device="meta")
    fake = _compat.new_fake(_compat.FakeTensorMode(), like, torch.device("cpu"))
    _compat.make_parameter(fake, trains)
    assert isinstance(fake, nn.Parameter) and isinstance(fake, _compat.FakeTensor)
    module = nn.Module()
    module.weight = fake
    assert dict(module.named_parameters()) == {"weight": fake}
    assert fake.requires_grad == trains and fake.is_leaf


def test_autograd_asks_modes_for_the_device_of_a_fake_gradient() -> None:
    answers = []

    class Mode(_compat.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            answers.append(_compat.device_asked(func, args))
            return func(*args, **kwargs or {})

    with _compat.FakeTensorMode(), Mode():  # type: ignore[no-untyped-call]
        torch.autograd.backward(torch.zeros(2, requires_grad=True).sum())
    assert torch.device("cpu") in answers, "the shim can go"
    assert None in answers


def test_ops_run_for_real_inside_a_dispatch_mode() -> None:
    seen = []

    class Mode(_compat.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            with _compat.real_execution():
                seen.append(torch.ones(2).sum().item())
            return func(*args, **kwargs or {})

    with _compat.FakeTensorMode(), Mode():  # type: ignore[no-untyped-call]
        torch.zeros(2)
    assert seen == [2.0]


def test_fake_tensors_look_real_to_transformers_for_a_while() -> None:
    with _compat.FakeTensorMode():
        fake = torch.zeros(1)
    assert import_utils.is_tracing(fake)
    with _compat.fake_tensors_look_real():
        assert not import_utils.is_tracing(fake)
    assert import_utils.is_tracing(fake)


def test_caches_on_functions_of_transformers_get_no_fake_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.pytorch_utils import compile_compatible_method_lru_cache

    calls = []

    @compile_compatible_method_lru_cache(maxsize=2)  # type: ignore[untyped-decorator]
    def cached(size: int) -> torch.Tensor:
        calls.append(size)
        return torch.ones(size)

    class Model(nn.Module):
        count = staticmethod(cached)

    monkeypatch.setattr(sys.modules[__name__], "Model", Model, raising=False)
    unseen = compile_compatible_method_lru_cache()(lambda: len(calls))
    with _compat.FakeTensorMode() as mode:
        with _compat.function_caches_apart(Model(), mode.from_tensor, set()):
            made = [cached(1), cached(1), cached(2)]
            assert all(isinstance(t, _compat.FakeTensor) for t in made)
            assert calls == [1, 2] and made[0] is made[1]
            assert unseen() == 2
    calls.append(3)
    assert unseen() == 3
    assert type(cached(1)) is torch.Tensor and calls == [1, 2, 3, 1]


def test_a_cache_that_is_too_small_is_filled_anew_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.pytorch_utils import compile_compatible_method_lru_cache

    @compile_compatible_method_lru_cache(maxsize=1)  # type: ignore[untyped-decorator]
    def cached(size: int) -> torch.Tensor:
        return torch.ones(size)

    class Model(nn.Module):
        count = staticmethod(cached)

    monkeypatch.setattr(sys.modules[__name__], "Model", Model, raising=False)
    too_small: set[Callable[..., Any]] = set()
    with _compat.FakeTensorMode() as mode:
        with _compat.function_caches_apart(Model(), mode.from_tensor, too_small):
            cached(1)
            with pytest.raises(_compat.CacheTooSmall, match="2 keys"):
                cached(2)
        with _compat.function_caches_apart(Model(), mode.from_tensor, too_small):
            first = cached(1)
            assert cached(1) is first
            second = weakref.ref(cached(2))
            assert cached(1) is not first and second() is None
            held = weakref.ref(cached(3))
            assert held() is not None
        assert held() is None
    assert type(cached(1)) is torch.Tensor


def test_views_have_the_strides_of_the_real_ones() -> None:
    func = torch.ops.aten.view.default

    def view(rows: int) -> tuple[int, ...]:
        x = torch.zeros(rows, 16, 64).permute(0, 2, 1)
        out: torch.Tensor = _compat.run_fake(func, (x, [rows, 64, 4, 4]), {})
        return out.stride()

    real = [view(1), view(2)]
    with _compat.FakeTensorMode():
        assert [view(1), view(2)] == real == [(64, 1, 256, 64), (1024, 1, 256, 64)]


def test_grouped_products_run_on_fake_tensors_of_any_dtype() -> None:
    func = torch.ops.aten._grouped_mm.default
    with _compat.FakeTensorMode():
        a, b = torch.zeros(16, 8), torch.zeros(2, 8, 8)
        out = _compat.run_fake(func, (a, b, torch.zeros(2, dtype=torch.int32)), {})
    assert (out.shape, out.dtype) == ((16, 8), torch.float32)
    assert flops_of(func, (a, b, None), {}, out) == 2 * 16 * 8 * 8


def test_other_kernels_are_there_for_a_while() -> None:
    def lower() -> list[torch.dtype]:
        x = torch.ones(2, 2)
        with torch.autocast("cpu", torch.bfloat16):
            return [(x @ x).dtype, x.double().exp().dtype, torch.stack([x, x @ x]).dtype]

    def exp(x: torch.Tensor) -> torch.Tensor:
        return x.float()

    before = lower()
    with (
        pytest.raises(KeyError),
        _compat.other_kernels("AutocastCPU", {"exp": exp, "matmul": None, "mm": None}),
    ):
        assert lower() == [torch.float32, torch.float32, torch.float32]
        raise KeyError
    assert lower() == before == [torch.bfloat16, torch.float64, torch.float32]


def test_each_device_has_its_own_autocast_ops() -> None:
    cpu, cuda = (_compat.ops_with_autocast(device) for device in ("CPU", "CUDA"))
    assert {"softmax.int", "layer_norm"} <= cuda - cpu
    assert "cat" in cpu - cuda
    assert "linear" in cpu & cuda


def test_autocast_of_cuda_is_the_cpu_s_for_a_while() -> None:
    forgotten: list[bool] = []
    assert not torch.is_autocast_enabled()
    with _compat.cuda_autocast_on_cpu(lambda: forgotten.append(True)):
        with torch.autocast("cuda", torch.float16):
            assert torch.is_autocast_enabled() and torch.is_autocast_enabled("cuda")
            assert torch.get_autocast_dtype("cuda") is torch.get_autocast_dtype("cpu")
            with torch.autocast("cpu", enabled=False):
                assert not torch.is_autocast_enabled("cuda")
            assert not forgotten
        assert forgotten == [True]
    with torch.autocast("cpu"):
        assert not torch.is_autocast_enabled()


def test_auto_is_for_a_gpu_that_is_here() -> None:
    with pytest.raises(BudgetError, match="'auto' reads the free memory of a GPU"):
        free_bytes(find_target(torch.nn.Linear(1, 1), "cpu"))


def test_a_meta_model_without_a_named_device_says_for_what_it_is_planned() -> None:
    target = find_target(torch.nn.Linear(1, 1, device="meta"), None)
    assert target.device.kind == "cuda"
    if not torch.cuda.is_available():
        assert "planned for a100-80gb" in target.notes[0]


def test_a_node_that_saves_what_it_made_is_told_from_others() -> None:
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            out = x.exp()
            with torch.enable_grad():
                x.sin()  # younger nodes
            ctx.save_for_backward(out)
            return out

    own: list[bool] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        own.append(_compat.is_own_output(tensor))
        return tensor.detach()

    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = x.sin().exp().softmax(0)  # saves a leaf, then two results
        y = y.cos()
        y.norm(dim=-1)  # saves what it is given and what it makes
        torch.linalg.qr(torch.ones(2, 2, requires_grad=True).tan())
        Both.apply(y.detach().requires_grad_())  # type: ignore[no-untyped-call]
    of_qr = [True] * 3  # what tan makes, then both results
    of_both = [False, True]  # the sine's input, then the result
    assert own == [False, True, True, False, False, True, *of_qr, *of_both]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["layer", "group", "batch"])
def test_gradients_of_norms_are_laid_out_as_by_the_kernels(name: str, channels_last: bool) -> None:
    aten = torch.ops.aten
    rows, weight, four = torch.randn(2, 16, 1), torch.ones(16), torch.ones(2, 4)
    wide = torch.randn(2, 8, 8, 16).permute(0, 3, 1, 2)
    source, gradient = (wide, wide.contiguous()) if channels_last else (wide.contiguous(), wide)
    if name == "layer":
        source, gradient = (t.flatten(2) for t in (source, gradient))
        weight, all_three = torch.ones(64), [True] * 3
        func = aten.native_layer_norm_backward.default
        args: tuple[Any, ...] = (gradient, source, [64], rows, rows, weight, weight, all_three)
    elif name == "group":
        func = aten.native_group_norm_backward.default
        args = (gradient, source, four, four, weight, 2, 16, 64, 4, [True] * 3)
    else:
        func = aten.native_batch_norm_backward.default
        args = (gradient, source, *[weight] * 5, True, 1e-5, [True] * 3)
    real = func(*args)
    with _compat.FakeTensorMode(allow_non_fake_inputs=True):
        fake = _compat.run_fake(func, args, {})
    assert [t.stride() for t in fake] == [t.stride() for t in real]


def test_batch_norm_of_single_pixels_is_laid_out_as_by_the_kernel() -> None:
    pixels, weight = torch.randn(2, 16, 1, 1), torch.ones(16)
    args = (pixels, weight, weight, weight.clone(), weight.clone(), True, 0.1, 1e-5)
    func = torch.ops.aten.native_batch_norm.default
    with _compat.FakeTensorMode(allow_non_fake_inputs=True):
        fake = _compat.run_fake(func, args, {})
    assert fake[0].stride() == func(*args)[0].stride()


def test_foreach_ops_on_fake_tensors_change_nothing_and_return_tensors_like_the_given() -> None:
    aten = torch.ops.aten
    with _compat.FakeTensorMode() as mode:
        many = [mode.from_tensor(torch.ones(2, 3)), mode.from_tensor(torch.ones(4))]
        counts = [torch.tensor(0.0), torch.tensor(0.0)]
        assert _compat.run_fake(aten._foreach_add_.Scalar, (many, 1), {}) is None
        roots = _compat.run_fake(aten._foreach_sqrt.default, (many,), {})
        assert [(t.shape, t.dtype) for t in roots] == [(t.shape, t.dtype) for t in many]
        assert not {_compat.storage_key(t) for t in roots} & {_compat.storage_key(t) for t in many}
        _compat.run_fake(aten._foreach_add_.Scalar, (counts, 1), {})
        assert [count.item() for count in counts] == [1.0, 1.0], "optimizers read step counts"


def test_a_module_on_fake_tensors_may_be_moved_to_where_it_is() -> None:
    with _compat.FakeTensorMode():
        module = torch.nn.Linear(2, 2)
        reference = weakref.ref(module.weight)
        with pytest.raises(RuntimeError, match="swap"):
            module.to("cpu")
        with _compat.modules_stay_where_they_are():
            assert module.to("cpu").weight is reference()
            with pytest.raises(RuntimeError, match="swap"):
                module.to(torch.float64)


def test_whether_outputs_are_collected_is_what_transformers_says(make: Callable[..., Any]) -> None:
    model, batch = make("llama")
    seen: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(_compat.collects_outputs()))
    model(**batch)
    model(**batch, output_hidden_states=True)
    assert seen == [False, True] and not _compat.collects_outputs()
