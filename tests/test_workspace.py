"""Memory inside kernels: the CPU's rules against the allocator, and what is measured for itself.

CUDA's rules are held against what the source of the kernels says.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.planner import workspace
from memfit.planner.capture import capture
from memfit.planner.cuda_ops import cuda_modes
from memfit.planner.cuda_workspace import with_cuda_workspace
from memfit.planner.devices import DEVICES
from memfit.planner.step_graph import StepGraph
from memfit.planner.workspace import WorkspaceError, with_cpu_workspace

ROOT = Path(__file__).parents[1]

Loss = Callable[[torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """A loss of one parameter."""

    def __init__(self, weight: torch.Tensor, loss: Loss) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.loss = loss

    def forward(self) -> torch.Tensor:
        return self.loss(self.weight)


def attention(weight: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(2, 1, 16, 16)
    return nn.functional.scaled_dot_product_attention(
        weight, weight, weight, attn_mask=mask, dropout_p=0.1
    ).sum()


def mixed(weight: torch.Tensor) -> torch.Tensor:
    return (weight * torch.ones(8, 64)).sum()


def transposed_table(weight: torch.Tensor) -> torch.Tensor:
    rows = nn.functional.embedding(torch.arange(32).reshape(4, 8) % 16, weight)
    return (rows.permute(2, 0, 1).contiguous() * torch.ones(8, 4, 8)).sum()


def transposed_scores(weight: torch.Tensor) -> torch.Tensor:
    scores = nn.functional.log_softmax(weight, -1).t().contiguous()
    return (scores * torch.ones(64, 8)).sum()


def normalized(weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(torch.ones(4, 8, 64), (64,), weight).sum()


def scaled(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 0.5).sum()


def shifted(weight: torch.Tensor) -> torch.Tensor:
    return (3 - weight).sum()


def selected(weight: torch.Tensor) -> torch.Tensor:
    return weight.masked_select(torch.arange(64) % 2 == 0).sum()


def selected_plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.masked_select(torch.ones(8, 64, dtype=torch.bool).tril(40)).sum()


def indexed(weight: torch.Tensor) -> torch.Tensor:
    return weight[torch.ones(8, 4, dtype=torch.bool).tril()].sum()


def node_of(step: StepGraph, name: str) -> fx.Node:
    node: fx.Node = next(n for n in step.nodes.values() if str(n.target).startswith(name))
    return node


@pytest.mark.parametrize(
    ("name", "weight", "loss"),
    [
        ("aten._safe_softmax", torch.zeros(2, 2, 16, 8), attention),
        ("aten.mul.Tensor", torch.zeros(8, 64, dtype=torch.bfloat16), mixed),
        ("aten.embedding_dense_backward", torch.zeros(16, 8), transposed_table),
        ("aten._log_softmax_backward_data", torch.zeros(8, 64), transposed_scores),
        ("aten.native_layer_norm_backward", torch.ones(64), normalized),
    ],
)
def test_rules_agree_with_the_allocator(name: str, weight: torch.Tensor, loss: Loss) -> None:
    step = capture(Model(weight, loss), ())
    node = node_of(step, name)
    request = workspace.Request(
        str(node.target), workspace._plain(node.args), workspace._plain(node.kwargs)
    )
    (measured,) = workspace._measure([request])
    assert workspace._by_rule(node) == measured.workspace_bytes > 0


@pytest.mark.parametrize(
    ("name", "weight", "loss"),
    [
        ("aten.mul.Tensor", torch.zeros(8, 64), scaled),
        ("aten.rsub.Scalar", torch.zeros(8, 64), shifted),
        ("aten.masked_select", torch.zeros(8, 64), selected),
        ("aten.masked_select", torch.zeros(8, 64), selected_plain),
        ("aten.index.Tensor", torch.zeros(8, 4, 16), indexed),
    ],
)
def test_rules_for_masks_and_numbers_agree_with_the_allocator(
    name: str, weight: torch.Tensor, loss: Loss
) -> None:
    """What memory depends on values for is run in the model itself."""
    node = node_of(capture(Model(weight, loss), ()), name)
    (measured,) = _measured_forward(weight, loss, name)
    assert workspace._by_rule(node) == measured > 0


def _measured_forward(weight: torch.Tensor, loss: Loss, name: str) -> list[int]:
    """What each call of an op allocates at most beyond its result."""
    script = f"""
import pickle, sys, torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tests import test_workspace as here
class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith({name!r}):
            return func(*args, **(kwargs or {{}}))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            out = func(*args, **(kwargs or {{}}))
        alive = most = 0
        events = profiled.profiler.kineto_results.events()
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            alive += size
            most = max(most, alive)
        print("BYTES", most - alive)
        return out
torch.set_num_threads({torch.get_num_threads()})
with torch.no_grad(), Mode():
    here.{loss.__name__}(torch.zeros({tuple(weight.shape)}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("BYTES")]
    return [int(size) for _, size in lines]


def test_products_in_half_precision_are_measured_and_those_in_single_are_not() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.zeros(512, 256, dtype=dtype)
        step = with_cpu_workspace(
            capture(Model(weight, lambda w: (w @ w.T.contiguous()).square().mean()), ())
        )
        measured = [op for op in step.ops if op.name == "aten.mm.default"]
        assert len(measured) == 3
        assert all(op.workspace_bytes >= 0 for op in measured)
        assert workspace._is_measured(node_of(step, "aten.mm")) == (dtype is torch.bfloat16)


def test_recurrent_layers_hold_what_only_their_kernel_knows() -> None:
    layer = nn.LSTM(16, 16)
    batch = {"input": torch.zeros(8, 2, 16)}
    made = []

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mkldnn_rnn_layer.default:
                made.append(out[3].nbytes)
            return out

    with Mode():  # type: ignore[no-untyped-call]
        layer(**batch)
    step = with_cpu_workspace(capture(layer, batch))
    (op,) = (op for op in step.ops if op.name == "aten.mkldnn_rnn_layer.default")
    sizes = [step.storages[storage].size_bytes for storage in op.outputs]
    assert sizes == [8 * 2 * 16 * 4, 2 * 16 * 4, 2 * 16 * 4, *made] and made[0] > 0


def test_a_loss_may_keep_the_memory_of_its_terms() -> None:
    def loss(weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(weight, torch.ones(8, 64))

    step = with_cpu_workspace(capture(Model(torch.zeros(8, 64), loss), ()))
    (op,) = (op for op in step.ops if op.name == "aten.mse_loss.default")
    real = loss(torch.zeros(8, 64)).untyped_storage().nbytes()
    assert step.storages[op.outputs[0]].size_bytes == real == 8 * 64 * 4


def test_products_read_matrices_as_they_lie_or_copy_them() -> None:
    """What is not a matrix is measured: whatever kernels do, nothing is left out."""
    strides = {(8, 1): True, (1, 4): True, (64, 1): True, (64, 2): False, (0, 1): False}
    right = workspace.TensorLike((8, 16), (16, 1), torch.float32)
    requests = [
        workspace.Request(
            "aten.mm.default", (workspace.TensorLike((4, 8), stride, torch.float32), right), {}
        )
        for stride in strides
    ]
    measured = [allocated.workspace_bytes == 0 for allocated in workspace._measure(requests)]
    rule = [workspace._is_matrix({"shape": (4, 8), "stride": stride}) for stride in strides]
    assert measured == rule == list(strides.values())
    assert workspace._is_matrix({"shape": (4, 1), "stride": (1, 1)})
    assert workspace._is_matrix({"shape": (2, 4, 8), "stride": (0, 8, 1)})
    assert workspace._is_matrix({"shape": (8,), "stride": (2,)})


def test_a_failing_measurement_says_what_failed() -> None:
    with pytest.raises(WorkspaceError, match=r"CPU kernels failed: .*no_such_op"):
        workspace._measure([workspace.Request("aten.no_such_op.default", (), {})])


@pytest.mark.parametrize("heads", [4, 2], ids=["heads", "groups"])
@pytest.mark.parametrize("head", [16, 160], ids=str)
def test_flash_attention_adds_up_in_float32(heads: int, head: int) -> None:
    def loss(weight: torch.Tensor) -> torch.Tensor:
        split = weight.view(2, 200, -1, head).transpose(1, 2)
        query, key, value = split[:, :4], split[:, 4 : 4 + heads], split[:, 4 + heads :]
        out = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return (out.transpose(1, 2) * torch.ones(4, head, dtype=torch.bfloat16)).sum()

    width = (4 + 2 * heads) * head
    model = Model(torch.zeros(2, 200, width, dtype=torch.bfloat16), loss)
    step = with_cuda_workspace(capture(model, (), modes=cuda_modes), DEVICES["a100-80gb"])
    name = "aten._scaled_dot_product_flash_attention_backward.default"
    found = {op.workspace_bytes for op in step.ops if op.name == name}
    # Rows in blocks of 128, heads of 160 as heads of 192: the gradient, and a sum for each row.
    expected = 2 * 4 * 256 * ({16: 32, 160: 192}[head] + 1) * 4
    expanded = 2 * (2 * 4 * 200 * head) * 2 if heads == 2 else 0
    assert found == {expected + expanded}


def test_flash_attention_copies_a_gradient_in_another_order() -> None:
    def loss(weight: torch.Tensor) -> torch.Tensor:
        out = nn.functional.scaled_dot_product_attention(weight, weight, weight)
        return (out * torch.ones(4, 128, 16, dtype=torch.bfloat16)).sum()

    model = Model(torch.zeros(2, 4, 128, 16, dtype=torch.bfloat16), loss)
    step = with_cuda_workspace(capture(model, (), modes=cuda_modes), DEVICES["a100-80gb"])
    size = 2 * 4 * 128 * 16 * 2
    assert max(op.workspace_bytes for op in step.ops) == 2 * 4 * 128 * 33 * 4 + 2 * size
