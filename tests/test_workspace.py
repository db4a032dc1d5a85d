"""Memory inside CPU kernels: the rules against the allocator, and what is measured for itself."""

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from memfit.planner import workspace
from memfit.planner.capture import capture
from memfit.planner.step_graph import StepGraph
from memfit.planner.workspace import WorkspaceError, with_cpu_workspace

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


def normalized(weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(torch.ones(4, 8, 64), (64,), weight).sum()


def node_of(step: StepGraph, name: str) -> fx.Node:
    node: fx.Node = next(n for n in step.graph.nodes if str(n.target).startswith(name))
    return node


@pytest.mark.parametrize(
    ("name", "weight", "loss"),
    [
        ("aten._safe_softmax", torch.zeros(2, 2, 16, 8), attention),
        ("aten.mul.Tensor", torch.zeros(8, 64, dtype=torch.bfloat16), mixed),
        ("aten.embedding_dense_backward", torch.zeros(16, 8), transposed_table),
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
    assert workspace._by_rule(node) == measured > 0


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


def test_a_failing_measurement_says_what_failed() -> None:
    with pytest.raises(WorkspaceError, match=r"CPU kernels failed: .*no_such_op"):
        workspace._measure([workspace.Request("aten.no_such_op.default", (), {})])
