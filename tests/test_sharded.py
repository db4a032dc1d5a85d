"""What the callback reads from a model that ``fully_shard`` was called on."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import TrainerControl, TrainerState, TrainingArguments

from memfit.integrations import ApplyError, MemfitCallback
from memfit.integrations.sharded import Twin, read_sharded
from memfit.planner.fingerprint import fingerprint

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    meet = (tmp_path / "meet").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model(make: Callable[..., Any]) -> nn.Module:
    whole: nn.Module = make("llama", layers=3)[0]
    return whole


def shard(model: Any, **how: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)


def test_layers_are_named_by_their_class(model: nn.Module) -> None:
    shard(model)
    found = read_sharded(model)
    assert (found.world_size, found.wrap) == (1, ("LlamaDecoderLayer",))
    assert found.reshard_after_forward is None


def test_what_stays_whole_and_what_is_sharded_together_is_read(model: Any) -> None:
    first, *others = model.model.layers
    fully_shard(first)
    for layer in others:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=True)
    assert read_sharded(model).wrap == (
        "model.layers.0", "model.layers.1:whole", "model.layers.2:whole", "model.norm+lm_head:whole"
    )  # fmt: skip
    assert read_sharded(model).reshard_after_forward is True


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, "offloaded to the CPU; leave it"),
        ({"mp_policy": BF16}, "casts the parameters of Llama"),
        ({"mesh": (1, 1)}, "sharded and replicated"),
    ],
)
def test_what_is_not_planned_is_named(model: nn.Module, how: dict[str, Any], words: str) -> None:
    if "mesh" in how:
        how = {"mesh": init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))}
    shard(model, **how)
    with pytest.raises(ApplyError, match=words):
        read_sharded(model)


def test_a_twin_is_the_model_as_it_was(model: nn.Module) -> None:
    twin, before = Twin(model), fingerprint(model)
    shard(model)
    next(iter(model.parameters())).requires_grad_(False)
    update = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    like = twin.like(model)
    assert all(p.is_meta for p in like.parameters())
    assert fingerprint(like) == fingerprint(model) != before
    made = twin.optimizer(update, model)
    assert made.param_groups[0]["params"] == list(like.parameters())
    assert made.param_groups[0]["lr"] == 0.5
    assert update.param_groups[0]["params"] == list(model.parameters())


def test_a_model_that_was_sharded_too_early_is_refused(model: nn.Module, tmp_path: Path) -> None:
    shard(model)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    for event in ("on_init_end", "on_train_begin"):
        with pytest.raises(ApplyError, match="LlamaForCausalLM was sharded before MemfitCallback"):
            getattr(MemfitCallback("1GiB"), event)(
                args, TrainerState(), TrainerControl(), model=model
            )
