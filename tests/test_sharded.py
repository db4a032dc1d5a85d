"""What the callback reads from a model that ``fully_shard`` was called on."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import TrainerControl, TrainerState, TrainingArguments

from memfit.integrations import ApplyError, MemfitCallback, apply
from memfit.integrations.sharded import Twin, read_sharded
from memfit.planner import plan
from memfit.planner.fingerprint import fingerprint


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
        (
            {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
            "offloaded to the CPU, which is not planned",
        ),
        ({"mp_policy": MixedPrecisionPolicy(output_dtype=torch.bfloat16)}, "casts what Llama"),
        ({"mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}, "not what it is given"),
        ({"mesh": (1, 1)}, "sharded and replicated"),
    ],
)
def test_what_is_not_planned_is_named(model: nn.Module, how: dict[str, Any], words: str) -> None:
    if "mesh" in how:
        how = {"mesh": init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))}
    shard(model, **how)
    with pytest.raises(ApplyError, match=words):
        read_sharded(model)


def test_the_dtypes_of_a_policy_are_read(model: nn.Module) -> None:
    shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    found = read_sharded(model)
    assert (found.param_dtype, found.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_parts_in_different_dtypes_are_refused(model: Any) -> None:
    fully_shard(model.model.layers[0], mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    fully_shard(model)
    with pytest.raises(ApplyError, match="different meshes or in different dtypes"):
        read_sharded(model)


@pytest.mark.parametrize(
    ("options", "how", "words"),
    [
        ({}, {}, r"world_size=2, and LlamaForCausalLM .* plan\(\.\.\., world_size=1\)"),
        (
            {"param_dtype": "bfloat16"},
            {"mp_policy": MixedPrecisionPolicy(torch.float16)},
            "param_dtype='bfloat16', .* sharded with 'float16'",
        ),
        ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, "offloaded to the CPU"),
    ],
)
def test_a_plan_does_not_run_on_a_model_that_is_sharded_otherwise(
    options: dict[str, Any], how: dict[str, Any], words: str, make: Callable[..., Any]
) -> None:
    model, batch = make("llama", layers=2)
    made = plan(model, 1 << 40, batch, device="cpu", sharding="fsdp2", world_size=2, **options)
    if "param_dtype" in options:  # as if it had been planned for this one process
        made = replace(made, workload=replace(made.workload, world_size=1))
    apply(made, model)
    shard(model, **how)
    with pytest.raises(ApplyError, match=words):
        model(**batch)


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
