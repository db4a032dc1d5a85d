"""The ops that a step takes for CUDA, and what autograd then saves of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.integrations.models import build_model
from memfit.planner import cuda_ops
from memfit.planner._compat import TorchDispatchMode
from memfit.planner.batches import Batch, make_batch
from memfit.planner.capture import capture
from memfit.planner.cuda_ops import AttentionCall, Kernel, choose_kernel, cuda_modes

A100, T4, RTX4090, H100 = (8, 0), (7, 5), (8, 9), (9, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OUTPUTS = {
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "math": "_safe_softmax",
}


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def call(
    dtype: torch.dtype = BF16, *, head: int = 64, kv_heads: int = 4, keys: int = 32, **rest: Any
) -> AttentionCall:
    """Attention of 2 x 4 heads over 32 queries; ``mask`` is a shape here, of numbers."""
    shape, bool_mask = rest.pop("mask", None), rest.pop("bool_mask", False)
    value_head = rest.pop("value_head", head)
    mask = None
    if shape is not None:
        needs = rest.pop("mask_grad", False)
        mask = torch.empty(shape, dtype=torch.bool if bool_mask else dtype, requires_grad=needs)
    return AttentionCall(
        torch.empty(2, 4, 32, head, dtype=dtype, requires_grad=True),
        torch.empty(2, kv_heads, keys, head, dtype=dtype, requires_grad=True),
        torch.empty(2, kv_heads, keys, value_head, dtype=dtype, requires_grad=True),
        mask,
        **rest,
    )


MASK = (2, 1, 32, 32)
CHOICES: list[tuple[str, dict[str, Any], tuple[int, int], Kernel]] = [
    ("half", {}, A100, "flash"),
    ("float32", {"dtype": FP32}, A100, "efficient"),
    ("float64", {"dtype": torch.float64}, A100, "math"),
    ("causal", {"causal": True}, A100, "flash"),
    ("causal-cross", {"causal": True, "keys": 48}, A100, "efficient"),
    ("dropout", {"dropout": 0.1}, A100, "flash"),
    ("mask", {"mask": MASK}, A100, "efficient"),
    ("mask-float32", {"mask": MASK, "dtype": FP32}, A100, "efficient"),
    ("mask-with-gradient", {"mask": (1, 4, 32, 32), "mask_grad": True}, A100, "efficient"),
    ("wide-head", {"head": 264}, A100, "efficient"),
    ("widest-flash-head", {"head": 256}, A100, "flash"),
    ("odd-head", {"head": 36}, A100, "flash"),
    ("odd-head-mask", {"head": 36, "mask": MASK}, A100, "math"),
    ("odd-head-float32", {"head": 36, "dtype": FP32}, A100, "efficient"),
    ("odder-head-float32", {"head": 38, "dtype": FP32}, A100, "math"),
    ("other-value-head", {"value_head": 32}, A100, "efficient"),
    ("groups", {"kv_heads": 2, "grouped": True}, A100, "flash"),
    ("t4-float16", {"dtype": FP16}, T4, "efficient"),
    ("t4-bfloat16", {}, T4, "math"),
    ("t4-float32-any-head", {"dtype": FP32, "head": 38}, T4, "efficient"),
    ("small-gpu-head-200", {"head": 200}, RTX4090, "efficient"),
    ("small-gpu-head-256", {"head": 256}, RTX4090, "flash"),
    ("small-gpu-head-256-dropout", {"head": 256, "dropout": 0.1}, RTX4090, "efficient"),
    ("h100", {}, H100, "cudnn"),
    ("h100-mask", {"mask": MASK}, H100, "cudnn"),
    ("h100-mask-with-gradient", {"mask": MASK, "mask_grad": True}, H100, "efficient"),
    ("h100-float32", {"dtype": FP32}, H100, "efficient"),
    ("h100-groups", {"kv_heads": 2, "grouped": True}, H100, "cudnn"),
    ("h100-dropout-in-sixteenths", {"dropout": 0.125}, H100, "cudnn"),
    ("h100-other-dropout", {"dropout": 0.1}, H100, "flash"),
    ("h100-wide-head", {"head": 256}, H100, "flash"),
]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("arguments", "capability", "expected"),
    [case[1:] for case in CHOICES],
    ids=[case[0] for case in CHOICES],
)
def test_the_kernel_is_pytorch_s_choice(
    arguments: dict[str, Any], capability: tuple[int, int], expected: Kernel
) -> None:
    cudnn = capability == H100
    chosen = choose_kernel(call(**arguments), capability, cudnn=cudnn)
    assert chosen == expected


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("since_2_14", [False, True])
def test_groups_in_float32_depend_on_the_release(
    since_2_14: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ops, "_EFFICIENT_GROUPS", since_2_14)
    grouped = call(FP32, kv_heads=2, grouped=True)
    assert choose_kernel(grouped, A100, cudnn=False) == ("efficient" if since_2_14 else "math")


def run(attention: AttentionCall, capability: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    """Attention under the modes, its backward too; returns what autograd saved."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with (
        cuda_modes(capability)[0],
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        out = F.scaled_dot_product_attention(
            attention.query,
            attention.key,
            attention.value,
            attn_mask=attention.mask,
            dropout_p=attention.dropout,
            is_causal=attention.causal,
            scale=attention.scale,
            enable_gqa=attention.grouped,
        )
    out.sum().backward()  # type: ignore[no-untyped-call]
    for tensor in (attention.query, attention.key, attention.value):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
    return out, saved


def described(saved: list[Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    kinds = [(t.dtype, tuple(t.shape)) for t in saved if t.numel() > 2]
    return sorted(kinds, key=str)


QKV = [(BF16, (2, 4, 32, 64))] * 3


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "dropout"])
def test_flash_saves_its_output_and_a_sum_per_row(dropout: float) -> None:
    out, saved = run(call(dropout=dropout, causal=True), A100)
    assert out.shape == (2, 4, 32, 64)
    expected = [*QKV, (BF16, (2, 4, 32, 64)), (FP32, (2, 4, 32))]
    assert described(saved) == sorted(expected, key=str)


@pytest.mark.usefixtures("fake")
def test_flash_keeps_groups_and_pads_heads() -> None:
    _, saved = run(call(kv_heads=2, grouped=True), A100)
    assert described(saved).count((BF16, (2, 2, 32, 64))) == 2
    out, saved = run(call(head=36), A100)
    assert out.shape == (2, 4, 32, 36)
    assert described(saved).count((BF16, (2, 4, 32, 40))) == 4


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("bool_mask", [False, True], ids=["numbers", "booleans"])
def test_efficient_attention_saves_the_bias_once(bool_mask: bool) -> None:
    _, saved = run(call(mask=MASK, bool_mask=bool_mask, dropout=0.1), A100)
    bias = next(t for t in saved if t.shape == (2, 4, 32, 32))
    assert bias.dtype is BF16
    assert bias.untyped_storage().nbytes() == 2 * 32 * 32 * 2, "expanded, not copied"
    assert (FP32, (2, 4, 32)) in described(saved)


@pytest.mark.usefixtures("fake")
def test_rows_of_a_bias_are_aligned() -> None:
    _, saved = run(call(mask=(2, 1, 32, 30), keys=30), A100)
    bias = next(t for t in saved if t.shape == (2, 4, 32, 30))
    assert bias.untyped_storage().nbytes() == 2 * 32 * 32 * 2
    assert bias.stride() == (32 * 32, 0, 32, 1)


@pytest.mark.usefixtures("fake")
def test_a_bias_gets_its_gradient() -> None:
    attention = call(mask=(1, 4, 32, 32), mask_grad=True)
    run(attention, A100)
    assert attention.mask is not None and attention.mask.grad is not None
    assert attention.mask.grad.shape == (1, 4, 32, 32)


@pytest.mark.usefixtures("fake")
def test_cudnn_takes_the_bias_as_it_is() -> None:
    _, saved = run(call(mask=MASK), H100)
    assert (BF16, MASK) in described(saved)
    assert (FP32, (2, 4, 32, 1)) in described(saved)


@pytest.mark.usefixtures("fake")
def test_math_works_in_float32_and_saves_booleans_of_dropout() -> None:
    _, saved = run(call(causal=True, dropout=0.1, kv_heads=2, grouped=True), T4)
    kinds = described(saved)
    assert kinds.count((torch.bool, (2, 4, 32, 32))) == 1
    assert not [kind for kind in kinds if kind[0] is BF16]


@pytest.mark.parametrize("masked", ["none", "causal", "bias", "booleans"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("grouped", [False, True], ids=["heads", "groups"])
def test_math_is_the_op_s_math(masked: str, dtype: torch.dtype, grouped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 6, 8, generator=generator).to(dtype)
        for heads in (4, 2 if grouped else 4, 2 if grouped else 4)
    )
    mask = None
    if masked == "bias":
        mask = torch.randn(6, 6, generator=generator).to(dtype)
    elif masked == "booleans":
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
    attention = AttentionCall(
        query, key, value, mask, causal=masked == "causal", scale=-0.3, grouped=grouped
    )
    expected = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attention.bias(), 0.0, attention.causal, scale=-0.3, enable_gqa=grouped
    )[0]
    assert torch.equal(cuda_ops._math_attention(attention), expected)


def test_without_gradients_no_sums_are_kept() -> None:
    with FakeTensorMode(), torch.no_grad():
        assert not call().needs_grad
    with FakeTensorMode():
        assert call().needs_grad


# -- dropout -------------------------------------------------------------------------------------


def saved_by(function: Any, tensor: Tensor) -> list[torch.dtype]:
    saved: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.dtype)
        return tensor

    with (
        cuda_modes()[0],
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        function(tensor)
    return saved


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "dropout",
    [
        nn.Dropout(0.1),
        lambda x: F.dropout(x, p=0.1, training=True),
        lambda x: F.dropout(x, 0.1),
        lambda x: torch.dropout(x, 0.1, True),
    ],
    ids=["module", "keywords", "positions", "builtin"],
)
def test_dropout_saves_booleans(dropout: Any) -> None:
    x = torch.empty(4, 4, dtype=BF16, requires_grad=True)
    assert saved_by(dropout, x) == [torch.bool]


@pytest.mark.usefixtures("fake")
def test_in_place_dropout_saves_noise_as_cuda_does() -> None:
    x = torch.empty(4, 4, dtype=BF16, requires_grad=True)
    assert saved_by(lambda x: F.dropout(x * 1, 0.1, inplace=True), x) == [BF16]


@pytest.mark.parametrize("arguments", [(0.0, True), (0.5, False), (1.0, True)], ids=str)
def test_dropout_without_chance_is_left_alone(arguments: tuple[float, bool]) -> None:
    p, training = arguments
    x = torch.arange(4.0)
    with cuda_modes()[0]:
        out = F.dropout(x, p, training)
        assert torch.equal(out, F.dropout(x, p, training, inplace=False))
        same = F.dropout(x, p, training, inplace=True)
    assert out.tolist() == ([0.0] * 4 if p == 1 else [0.0, 1.0, 2.0, 3.0])
    assert same is x


def test_wrong_chances_stay_errors() -> None:
    with cuda_modes()[0], pytest.raises(ValueError, match="between 0 and 1"):
        F.dropout(torch.ones(2), 1.5)


# -- norms and softmax ---------------------------------------------------------------------------


def saved_of(function: Callable[[Tensor], Tensor], tensor: Tensor) -> list[Any]:
    """What autograd saves under all that a capture for CUDA enters; runs the backward too."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with ExitStack() as stack:
        for mode in cuda_modes():
            stack.enter_context(mode)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        function(tensor).sum().backward()  # type: ignore[no-untyped-call]
    assert tensor.grad is not None and tensor.grad.dtype is tensor.dtype
    return [(t.dtype, tuple(t.shape)) for t in saved]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_layer_norm_saves_float32_statistics(dtype: torch.dtype) -> None:
    x = torch.empty(2, 4, 8, dtype=dtype, requires_grad=True)
    norm = nn.LayerNorm(8, dtype=dtype)
    assert sorted(saved_of(norm, x), key=str) == sorted(
        [(dtype, (2, 4, 8)), *[(FP32, (2, 4, 1))] * 2, *[(dtype, (8,))] * 2], key=str
    )
    assert norm.weight.grad is not None and norm.weight.grad.dtype is dtype


@pytest.mark.usefixtures("fake")
def test_other_norms_save_what_their_kernels_return() -> None:
    x = torch.empty(2, 4, 8, dtype=BF16, requires_grad=True)
    groups = saved_of(nn.GroupNorm(2, 4, dtype=BF16), x)
    assert groups.count((BF16, (2, 2))) == 2
    batch = saved_of(nn.BatchNorm1d(4, dtype=BF16), x)
    assert batch.count((FP32, (4,))) == 2


@pytest.mark.usefixtures("fake")
def test_rms_norm_is_one_op() -> None:
    x = torch.empty(2, 4, 8, dtype=BF16, requires_grad=True)
    saved = saved_of(nn.RMSNorm(8, dtype=BF16), x)
    assert sorted(saved, key=str) == [(BF16, (2, 4, 8)), (BF16, (8,)), (FP32, (2, 4, 1))]
    channels_last = torch.empty(2, 4, 8, 8, dtype=BF16).to(memory_format=torch.channels_last)
    parts = saved_of(nn.RMSNorm(8, dtype=BF16), channels_last.requires_grad_())
    assert len(parts) > 3, "which the fused kernel does not take"
    assert F.rms_norm(x, (8,)).grad_fn.name() != "FusedRmsNormBackward0"  # type: ignore[union-attr]


def test_rms_norm_of_real_tensors_works_meanwhile() -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    expected = F.rms_norm(x, (8,))
    with cuda_modes()[2]:
        assert torch.equal(F.rms_norm(x, (8,)), expected)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("function", [F.softmax, F.log_softmax])
def test_softmax_of_float16_in_float32_copies_nothing(function: Any) -> None:
    class Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            ops.append(func.overloadpacket)
            return func(*args, **kwargs or {})

    def call(x: Tensor) -> Tensor:
        with Ops():  # type: ignore[no-untyped-call]
            out: Tensor = function(x, -1, dtype=FP32)
        return out

    ops: list[Any] = []
    assert saved_of(call, torch.empty(2, 8, dtype=FP16, requires_grad=True)) == [(FP32, (2, 8))]
    assert torch.ops.aten._to_copy not in ops
    assert saved_of(call, torch.empty(2, 8, dtype=BF16, requires_grad=True)) == [(FP32, (2, 8))]
    assert torch.ops.aten._to_copy in ops


# -- models --------------------------------------------------------------------------------------

TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": TEXT | {"num_key_value_heads": 1, "intermediate_size": 64},
    "gpt2": {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 2},
    "bert": TEXT | {"intermediate_size": 64},
    "vit": TEXT | {"intermediate_size": 64, "image_size": 32, "patch_size": 8},
    "t5": {
        "vocab_size": 99,
        "d_model": 64,
        "d_kv": 32,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
    },
}
EXPECTED: dict[str, dict[str, set[str]]] = {
    "llama": {"bfloat16": {"flash"}, "float32": {"math"}},
    "gpt2": {"bfloat16": {"flash"}, "float32": {"efficient"}},
    "bert": {"bfloat16": {"flash"}, "float32": {"efficient"}},
    "vit": {"bfloat16": {"flash"}, "float32": {"efficient"}},
    "t5": {"bfloat16": {"efficient"}, "float32": {"efficient"}},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_models_on_meta_are_captured_with_cuda_s_kernels(
    name: str, dtype: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ops, "_EFFICIENT_GROUPS", False)
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name] | {"model_type": name}))
    model = build_model(str(tmp_path), dtype=dtype)
    length = None if name == "vit" else 32
    arguments, _ = make_batch(model, Batch(2, length))
    graph = capture(model, arguments, modes=cuda_modes)
    names = " ".join(op.name for op in graph.ops)
    taken = {kernel for kernel, op in OUTPUTS.items() if f"aten.{op}.default" in names}
    assert taken == EXPECTED[name][dtype]
    assert "flash_attention_for_cpu" not in names
    assert "bernoulli" not in names
    assert ("native_dropout.default" in names) == (name in ("gpt2", "bert", "t5"))
