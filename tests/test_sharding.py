"""Plans for one of several processes: what DDP and FSDP2 hold is predicted as it is measured."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from memfit.integrations import apply
from memfit.integrations.forwards import ApplyError
from memfit.planner import Batch, InfeasibleBudget, plan
from memfit.planner.errors import ShardingError, SolverError
from memfit.planner.fsdp2 import Unit, find_groups
from memfit.planner.mixed_precision import Precision
from memfit.planner.preparing import prepare
from memfit.planner.report import format_plan
from memfit.planner.step_graph import Kind
from memfit.solvers import SOLVERS

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
LEAVING = str(Path(__file__).parent / "leave_at_once.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", LEAVING)


@pytest.mark.parametrize(
    "case",
    [
        "llama fsdp2 0.5 adamw",
        "lora fsdp2 0.6 adamw always",
        "bert fsdp2 0.4 adamw kept never",
        "llama fsdp2 0.2 adamw mixed kept always",
        "bert fsdp2 0.1 adamw low",
        "llama ddp 0.5 adamw",
    ],
)
def test_two_processes_keep_to_their_plan(case: str) -> None:
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(ROOT / "tests" / "process_step.py"), *case.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": PATH},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 2
    for report in reports:
        measured = report["measured_bytes"]
        # DDP now and then takes 128 bytes for its own counts.
        assert measured == pytest.approx(report["predicted_bytes"], abs=256 * ("ddp" in case))
        assert measured <= report["allowed_bytes"]
        assert report["equal"] and report["learnt"]
        assert "selective" in report["actions"]


def test_a_process_holds_its_shard(make: Callable[..., Any]) -> None:
    model, batch = make("llama")
    alone = plan(model, 1 << 40, batch, optimizer="adamw", device="h100").predicted
    options: dict[str, Any] = {"optimizer": "adamw", "device": "h100", "world_size": 8}
    shared = plan(model, 1 << 40, batch, sharding="fsdp2", **options)
    assert shared.workload.sharding == "fsdp2" and shared.workload.world_size == 8
    state = sum(p.numel() * p.element_size() for p in model.parameters()) * 3
    saved = alone.resident_bytes - shared.predicted.resident_bytes
    assert state * 7 / 8 * 0.95 < saved <= state * 7 / 8
    assert "gathered parameter" in shared.predicted.alive_at_peak
    assert "8, fsdp2 of LlamaDecoderLayer; all figures are of one" in format_plan(shared)
    buckets = plan(model, 1 << 40, batch, sharding="ddp", **options).predicted
    assert buckets.resident_bytes - alone.resident_bytes == pytest.approx(state / 3, rel=0.01)


def test_groups_are_the_layers_and_what_is_left(make: Callable[..., Any]) -> None:
    model, _ = make("llama", layers=2)
    layers = [Unit((f"model.layers.{i}",), True) for i in range(2)]
    groups = find_groups(model, (Unit(("",), False), *layers), 3, Precision())
    assert [g.name for g in groups] == ["", "model.layers.0", "model.layers.1"]
    assert [*groups[1].sizes_bytes.values()] == [*groups[2].sizes_bytes.values()]
    for group in groups:
        assert all(size % 3 == 0 for size in group.sizes_bytes.values())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert whole <= sum(group.all_bytes for group in groups) < 1.1 * whole


def test_what_holds_layers_that_are_gathered_apart_is_kept(make: Callable[..., Any]) -> None:
    model, batch = make("llama", layers=2)
    made = plan(
        model, 1 << 40, batch, device="cpu", sharding="fsdp2", world_size=2, wrap=["LlamaMLP"]
    )
    layers = [r for r in made.regions if r.name.startswith("model.layers")]
    assert len(layers) == 2
    assert all("gathered apart" in r.kept_because for r in layers)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("reshard", [None, True, False])
def test_what_is_laid_over_a_step_lives_in_it(
    name: str, reshard: bool | None, make: Callable[..., Any]
) -> None:
    model, batch = make(name, layers=2)
    next(iter(model.parameters())).requires_grad_(False)
    wrap = ["BertLayer"] if name == "bert" else None
    task = prepare(
        model, batch, device="h100", sharding="fsdp2", world_size=4, wrap=wrap,
        reshard_after_forward=reshard, optimizer="adamw",
    ).task  # fmt: skip
    laid = [s for s in task.step.storages if s.born >= 0 and s.size_bytes]
    assert {Kind.WHOLE_PARAMETER, Kind.COLLECTIVE} <= {s.kind for s in laid}
    assert all(s.born < s.released <= len(task.step.ops) for s in laid)
    outcome = task.simulate(SOLVERS["none"](task.problem))
    assert (outcome.timeline.alive_bytes >= task.resident_bytes).all()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.inner(x).sum()
        return total


def test_a_parameter_without_dimensions_is_named() -> None:
    model = Plain()
    model.scale = nn.Parameter(torch.tensor(1.0))
    options: dict[str, Any] = {"device": "cpu", "sharding": "fsdp2", "world_size": 2}
    with pytest.raises(ShardingError, match="cannot shard scale, a parameter without dimensions"):
        plan(model, "1GiB", (torch.ones(2, 8),), wrap=["Linear"], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sharding": "zero3", "world_size": 2}, "unknown sharding 'zero3'"),
        ({"sharding": "fsdp2"}, "need both"),
        ({"world_size": 4}, "need both"),
        ({"world_size": 0}, "world_size is 0"),
        ({"sharding": "ddp", "world_size": 2, "wrap": ["Linear"]}, "sharding='fsdp2'"),
        ({"sharding": "ddp", "world_size": 2, "param_dtype": "bfloat16"}, "sharding='fsdp2'"),
        (
            {"sharding": "fsdp2", "world_size": 2, "wrap": ["inner"], "reduce_dtype": "bf16"},
            "reduce_dtype is 'bf16'",
        ),
        ({"sharding": "fsdp2", "world_size": 2}, "name their classes"),
        ({"sharding": "fsdp2", "world_size": 2, "wrap": ["Layer"]}, "no module of the class"),
        ({"sharding": "fsdp2", "world_size": 2, "wrap": ["inner+outer"]}, "nor of that name"),
        ({"sharding": "fsdp2", "world_size": 2, "wrap": ["inner:wide"]}, "'inner:wide', nor"),
        ({"sharding": "fsdp2", "world_size": 2, "wrap": ["inner", "Linear"]}, "names inner twice"),
    ],
)
def test_what_cannot_be_spread_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardingError, match=words):
        plan(Plain(), "1GiB", (torch.ones(2, 8),), device="cpu", **options)


def test_regions_are_not_recomputed_together(make: Callable[..., Any]) -> None:
    model, batch = make("llama", layers=2)
    options: dict[str, Any] = {"device": "cpu", "sharding": "fsdp2", "world_size": 2}
    with pytest.raises(SolverError, match="does not gather the weights"):
        plan(model, 1 << 40, batch, solver="nested_dp", **options)
    assert plan(model, 1 << 40, Batch(1, 8), **options).predicted.overhead == 0


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    meet = (tmp_path / "meet").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_plan_for_one_process_is_refused_where_it_cannot_run(make: Callable[..., Any]) -> None:
    model, batch = make("llama", layers=4)
    with pytest.raises(InfeasibleBudget) as error:
        plan(model, 1, batch, device="cpu")
    made = plan(model, error.value.minimum_bytes, batch, device="cpu")
    assert any(region.recompute_input for region in made.regions)
    handle = apply(made, model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with pytest.raises(ApplyError, match=r"make it with plan\(\.\.\., sharding='fsdp2'\)"):
        model(**batch)
    with pytest.raises(ShardingError, match="is sharded already"):
        plan(model, "1GiB", batch, device="cpu")
    handle.remove()
    free = plan(make("llama", layers=4)[0], "1GiB", batch, device="cpu")
    with apply(free, model):
        model(**batch).loss.backward()
