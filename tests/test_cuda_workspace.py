"""What CUDA kernels take inside: rules against the allocator of an H100 (torch 2.11, 2026-11)."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from memfit.planner.capture import capture
from memfit.planner.cuda_workspace import with_cuda_workspace
from memfit.planner.devices import DEVICES


class Model(nn.Module):
    def __init__(self, loss: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes
        )
        self.loss = loss

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.loss(*self.weights, *batch)


def workspace(op: str, model: Model, *batch: torch.Tensor) -> set[int]:
    step = with_cuda_workspace(capture(model, batch), DEVICES["h100"])
    return {o.workspace_bytes for o in step.ops if o.name.startswith(f"aten.{op}")}


@pytest.mark.parametrize(
    ("shape", "dims", "measured"),
    [
        ((8192, 4096), [0], 138412544),
        ((8192, 3072), [0], 138412544),
        ((12608, 4096), [0], 138412544),
        ((8192, 1024), [0], 67109376),
        ((12608, 1024), [0], 103285248),
        ((2, 2048, 4096), [0, 1], 134218240),
        ((8, 256, 1024), [0, 1], 16777728),
        ((2, 2048, 8, 128), [0, 1, 2], 33554944),
        ((2, 2048, 32, 128), [0, 1, 2], 134218240),
        ((8, 1024, 4096), [2], 0),
    ],
    ids=str,
)
def test_reductions_by_several_blocks_keep_the_sums_of_all_threads(
    shape: tuple[int, ...], dims: list[int], measured: int
) -> None:
    model = Model(lambda weight: weight.sum(dims).mean(), shape)
    assert measured in workspace("sum.dim_IntList", model)


@pytest.mark.parametrize(
    ("rows", "width", "count", "measured"),
    [
        (128256, 4096, 4096, 74011136),
        (50257, 1024, 8192, 37309952),
        (32128, 1024, 4096, 18653696),
        (512, 1024, 3072, 0),
    ],
    ids=str,
)
def test_gradients_of_embeddings_add_up_in_float32(
    rows: int, width: int, count: int, measured: int
) -> None:
    model = Model(lambda weight, ids: nn.functional.embedding(ids, weight).mean(), (rows, width))
    ids = torch.zeros(count, dtype=torch.long)
    assert workspace("embedding_dense_backward", model, ids) == {measured}


def test_convolutions_copy_with_the_channels_last() -> None:
    def loss(weight: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(images, weight, stride=16).mean()

    model = Model(loss, (1024, 3, 16, 16))
    images = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    assert workspace("convolution.default", model, images) == {81265152}
    assert workspace("convolution_backward", model, images) == {106430976}


def test_softmax_backward_multiplies_into_a_tensor_of_its_own() -> None:
    model = Model(lambda weight: weight.softmax(-1, dtype=torch.float32)[..., 0].mean(), (8, 512))
    assert workspace("_softmax_backward_data", model) == {8 * 512 * 4}
