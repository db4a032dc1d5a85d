"""Autocast as CUDA does it, on fake CPU tensors: which ops it casts, and what autograd saves."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.planner import Batch, cuda_autocast, plan
from memfit.planner._compat import ops_with_autocast
from memfit.planner.capture import capture
from memfit.planner.cuda_ops import cuda_modes
from memfit.planner.errors import CaptureError, InfeasibleBudget
from memfit.planner.step_graph import Kind, StepGraph

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = (9, 0)


@pytest.fixture
def cuda() -> Iterator[None]:
    """Fake tensors and all that a capture for CUDA enters."""
    with FakeTensorMode(), ExitStack() as stack:
        for mode in cuda_modes(H100):
            stack.enter_context(mode)
        yield


def saved_by(function: Callable[[], Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """What autograd saves of a function; runs the backward too."""
    saved: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    out.float().sum().backward()  # type: ignore[no-untyped-call]
    return sorted(saved, key=str)


def test_the_lists_are_those_of_this_torch() -> None:
    lists = [
        cuda_autocast._LOWER_PRECISION,
        cuda_autocast._FLOAT32,
        cuda_autocast._FLOAT32_RESULT,
        cuda_autocast._WIDEST,
        cuda_autocast._REFUSED,
    ]
    known = {name for names in lists for name in names.split()}
    unknown = ops_with_autocast("CUDA") - known - set(cuda_autocast._FLOAT32_OVERLOAD)
    # Named tensors, up to PyTorch 2.12, and an op of CUDA builds, are not emulated.
    assert not [n for n in unknown if "imname" not in n and ".names_" not in n and "rnn" not in n]


# In the list of PyTorch 2.13, not yet in that of 2.11.
RMS_NORM = FP32 if "rms_norm" in ops_with_autocast("CUDA") else None
half = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], torch.dtype | None]] = {
    # ``low`` is what a linear layer returned, ``full`` is float32; None stands for the low dtype.
    "matmul": (lambda low, full: full @ full.mT, None),
    "linear": (lambda low, full: F.linear(full, full), None),
    "einsum": (lambda low, full: torch.einsum("bi,ci->bc", full, full), None),
    "mv": (lambda low, full: torch.mv(full, full[0]), None),
    "conv-same": (lambda low, full: F.conv1d(full, full[:, :, None], padding="same"), None),
    "gelu": (lambda low, full: F.gelu(low), None),
    "softmax": (lambda low, full: torch.softmax(low, -1), FP32),
    "log-softmax": (lambda low, full: F.log_softmax(low, -1), FP32),
    "softmax-as-asked": (
        lambda low, full: torch.softmax(low, -1, dtype=torch.float64),
        torch.float64,
    ),
    "layer-norm": (lambda low, full: F.layer_norm(low, (8,)), FP32),
    "rms-norm": (lambda low, full: F.rms_norm(low, (8,)), RMS_NORM),
    "group-norm": (lambda low, full: F.group_norm(low, 2), FP32),
    "batch-norm": (lambda low, full: F.batch_norm(low, None, None, training=True), None),
    "pow": (lambda low, full: low**2, FP32),
    "rsqrt": (lambda low, full: low.rsqrt(), FP32),
    "exp": (lambda low, full: low.exp(), FP32),
    "softplus": (lambda low, full: F.softplus(low), FP32),
    "sum": (lambda low, full: low.sum(-1), FP32),
    "cumsum": (lambda low, full: low.cumsum(0), FP32),
    "prod": (lambda low, full: low.prod(-1), FP32),
    "norm": (lambda low, full: low.norm(), FP32),
    "norm-of-rows": (lambda low, full: torch.ops.aten.norm.ScalarOpt_dim(low, 2, [1]), FP32),
    "norm-default": (lambda low, full: torch.ops.aten.norm.Scalar(low), FP32),
    "l1-loss": (lambda low, full: F.l1_loss(low, low), FP32),
    "mse-loss": (lambda low, full: F.mse_loss(low, full), FP32),
    "bce-logits": (lambda low, full: F.binary_cross_entropy_with_logits(low, full), FP32),
    "cross-entropy": (lambda low, full: F.cross_entropy(low, full.softmax(-1).argmax(-1)), FP32),
    "upsample": (lambda low, full: F.interpolate(low[None], scale_factor=2.0), FP32),
    "addcmul-wide": (lambda low, full: torch.addcmul(low, low, full), FP32),
    "addcmul-low": (lambda low, full: torch.addcmul(low, low, low), None),
    "cat": (lambda low, full: torch.cat([low, full]), FP32),
    "cat-low": (lambda low, full: torch.cat([low, low]), None),
    "max-pool3d": (lambda low, full: F.max_pool3d(low[None, None], 1), None),
    "pad": (lambda low, full: F.pad(low[None], (1, 1), "reflect"), None),
    "double": (lambda low, full: F.layer_norm(full.double(), (8,)), torch.float64),
}


@pytest.mark.usefixtures("cuda")
@half
@pytest.mark.parametrize("case", CASES)
def test_an_op_runs_in_the_dtype_that_cuda_runs_it_in(case: str, dtype: torch.dtype) -> None:
    function, expected = CASES[case]
    full = torch.empty(8, 8, requires_grad=True)
    with torch.autocast("cuda", dtype):
        low = F.linear(full, full)
        out = function(low, full)
        assert low.dtype is dtype
    assert out.dtype is (expected or dtype)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert full.grad is not None and full.grad.dtype is FP32


@pytest.mark.usefixtures("cuda")
def test_what_a_small_network_saves() -> None:
    linear, norm, head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 5)
    x, labels = torch.empty(4, 8), torch.zeros(4, dtype=torch.long)

    def forward() -> Tensor:
        with torch.autocast("cuda", BF16):
            hidden = F.dropout(norm(linear(x)), 0.1)
            return F.cross_entropy(head(hidden.softmax(-1)), labels)

    expected = [
        (BF16, (4, 8)),  # the first product's input; its weight is not needed
        *[(FP32, (4, 16)), (FP32, (4, 1)), (FP32, (4, 1)), (FP32, (16,)), (FP32, (16,))],
        (torch.bool, (4, 16)),
        (FP32, (4, 16)),  # of softmax
        *[(BF16, (4, 16)), (BF16, (16, 5))],  # the second product
        # log_softmax is asked for the dtype of its input by cross_entropy; nll_loss casts it.
        *[(BF16, (4, 5)), (FP32, (4, 5)), (torch.long, (4,)), (FP32, ())],
    ]
    assert saved_by(forward) == sorted(expected, key=str)


@pytest.mark.usefixtures("cuda")
def test_attention_is_cast_before_its_kernel_is_chosen() -> None:
    q = torch.empty(2, 4, 32, 64, requires_grad=True)
    mask = torch.empty(2, 1, 32, 32)

    def forward(mask: Tensor | None, p: float) -> Tensor:
        with torch.autocast("cuda", BF16):
            return F.scaled_dot_product_attention(q, q, q, mask, p)

    flash = saved_by(lambda: forward(None, 0.1))
    assert [s for s in flash if len(s[1]) > 2] == [(BF16, (2, 4, 32, 64))] * 4 + [
        (FP32, (2, 4, 32))
    ]
    assert (BF16, (2, 1, 32, 32)) in saved_by(lambda: forward(mask, 0.0))


@pytest.mark.usefixtures("cuda")
def test_a_weight_is_cast_once_and_forgotten_at_the_end() -> None:
    weight = torch.empty(8, 8, requires_grad=True)
    with torch.autocast("cuda", BF16):
        # The first kernel is torch's, the second one of ours: each has a cache.
        products = [F.linear(weight, weight), F.linear(weight, weight)]
        einsums = [torch.einsum("ij,kj->ik", weight, weight) for _ in range(2)]
        casts = [node(out) for out in einsums]
        assert casts[0] is casts[1]
        assert node(products[0]) is node(products[1])
    with torch.autocast("cuda", BF16):
        assert node(torch.einsum("ij,kj->ik", weight, weight)) is not casts[0]


def node(out: Tensor) -> Any:
    """The cast in the history of a product."""
    found = out.grad_fn
    while found is not None and found.name() != "ToCopyBackward0":
        found = found.next_functions[0][0]
    assert found is not None
    return found


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_can_leave_autocast(device: str) -> None:
    x = torch.empty(4, 8)
    with torch.autocast("cuda", BF16):
        assert torch.is_autocast_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cuda") is BF16
        with torch.autocast(device, enabled=False):
            assert not torch.is_autocast_enabled()
            assert (x @ x.mT).dtype is FP32
            assert x.bfloat16().softmax(-1).dtype is BF16
        assert (x @ x.mT).dtype is BF16


def test_nothing_stays_behind() -> None:
    def dtypes() -> list[torch.dtype]:
        x = torch.ones(2, 8)
        with torch.autocast("cpu", BF16):
            low = x @ x.mT
            return [low.softmax(-1).dtype, torch.cat([low, low]).dtype, F.l1_loss(low, low).dtype]

    before, names = dtypes(), ops_with_autocast("CPU")
    init = torch.autocast.__init__
    with pytest.raises(KeyError), cuda_autocast.cuda_autocast():
        assert dtypes() != before
        raise KeyError
    ops_with_autocast.cache_clear()
    assert (dtypes(), ops_with_autocast("CPU"), torch.autocast.__init__) == (before, names, init)


def test_what_cuda_refuses_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self) -> Tensor:
            return F.binary_cross_entropy(self.weight, self.weight.detach())

    with pytest.raises(CaptureError, match="refuses binary_cross_entropy"):
        plan(Model(), 1 << 40, (), device="h100", autocast="bfloat16")
    assert plan(Model(), 1 << 40, (), device="h100").regions == ()


# -- models --------------------------------------------------------------------------------------


def captured(model: Any, batch: Any, dtype: torch.dtype | None = BF16) -> StepGraph:
    return capture(model, batch, autocast=dtype, modes=partial(cuda_modes, H100))


def copies_of_parameters(step: StepGraph) -> dict[int, int]:
    """The storage of each copy of a parameter, by the parameter's."""
    return {
        op.inputs[0]: op.outputs[0]
        for op in step.ops
        if op.name == "aten._to_copy.default" and step.storages[op.inputs[0]].kind is Kind.PARAMETER
    }


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_models_are_captured_under_autocast(name: str, make: Callable[..., Any]) -> None:
    model, batch = make(name, layers=2, attention="eager")
    step = captured(model, batch)
    # Every weight of a product has one copy of half its size, and norms and embeddings none.
    copies = copies_of_parameters(step)
    sizes = sorted(step.storages[copy].size_bytes for copy in copies.values())
    products = [m for m in model.modules() if isinstance(m, nn.Linear) or "Conv1D" in str(type(m))]
    weights = {id(p): p for m in products for p in m.parameters()}.values()
    assert sizes == sorted(p.numel() * 2 for p in weights)
    saved = {s.storage for s in step.saved}
    kept = [step.storages[copy].size_bytes for copy in copies.values() if copy in saved]
    assert sum(kept) >= 0.9 * sum(p.numel() * 2 for p in weights if p.dim() > 1)
    dtypes = {op.name: op.dtype for op in step.ops}
    assert dtypes["aten._softmax.default"] == "float32"
    assert dtypes["aten.mm.default"] == "bfloat16"
    if name != "llama":
        assert dtypes["aten.native_layer_norm.default"] == "float32"
        assert "native_dropout" in " ".join(dtypes)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_models_are_planned_under_autocast(name: str, make: Callable[..., Any]) -> None:
    model, batch = make(name, layers=2)[0].to("meta"), Batch(64, 16)
    free = plan(model, 1 << 40, batch, device="h100", autocast="bfloat16")
    assert free.workload.autocast == "bfloat16"
    with pytest.raises(InfeasibleBudget) as error:
        plan(model, free.predicted.resident_bytes, batch, device="h100", autocast="bfloat16")
    least = error.value.minimum_bytes
    tight = plan(model, least, batch, device="h100", autocast="bfloat16")
    assert tight.predicted.peak_bytes < free.predicted.peak_bytes
    assert tight.predicted.peak_bytes <= least
    assert {r.action for r in free.regions} == {"keep"} != {r.action for r in tight.regions}


def test_rotary_embeddings_leave_autocast(make: Callable[..., Any]) -> None:
    step = captured(*make("llama", layers=1))
    angles = [op for op in step.ops if op.name in ("aten.cos.default", "aten.sin.default")]
    assert [op.dtype for op in angles] == ["float32"] * 2


def saved_bytes(step: StepGraph) -> list[int]:
    """Seeds are left out: with CUDA some are in host memory."""
    sizes = [step.storages[index].size_bytes for index in {s.storage for s in step.saved}]
    return sorted(size for size in sizes if size > 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [None, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "vit", "t5"])
def test_the_emulated_step_is_the_device_s(
    name: str, dtype: torch.dtype | None, make: Callable[..., Any]
) -> None:
    model, batch = make(name, layers=2)
    capability = torch.cuda.get_device_capability()
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    prefers_cudnn = capability in {(9, 0), (10, 0), (10, 3)} and version > 91500
    modes = partial(cuda_modes, capability, cudnn=prefers_cudnn)
    emulated = capture(model, batch, autocast=dtype, modes=modes)
    on_device = {key: value.cuda() for key, value in batch.items()}
    real = capture(model.cuda(), on_device, autocast=dtype)
    assert saved_bytes(emulated) == saved_bytes(real)
