"""One of two processes of ``test_sharding``: a planned step beside the same one without a plan.

    torchrun --nproc-per-node 2 tests/process_step.py MODEL SHARDING SHARE OPTIMIZER [kept]
        [always|never] [mixed|low]

Prints a JSON line with what was predicted and measured, and whether the two agree to the bit. Runs
in a process of its own, since the allocator's events can be read once in each.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import measure_peak
from memfit.integrations import apply
from memfit.planner import InfeasibleBudget, Plan, plan

WORDS = 1003  # not to be cut in two evenly


def llama() -> tuple[nn.Module, dict[str, torch.Tensor], str]:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=WORDS,
    )  # fmt: skip
    ids = torch.randint(0, WORDS, (4, 64))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}, "LlamaDecoderLayer"


def lora() -> tuple[nn.Module, dict[str, torch.Tensor], str]:
    model, batch, layer = llama()
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])), batch, layer


def bert() -> tuple[nn.Module, dict[str, torch.Tensor], str]:
    config = BertConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=WORDS,
    )  # fmt: skip
    batch = {"input_ids": torch.randint(0, WORDS, (4, 64)), "labels": torch.zeros(4).long()}
    return BertForSequenceClassification(config), batch, "BertLayer"


def let_go_at_once() -> None:
    """Gloo's threads may be the last to hold a buffer, and a profiler does not see them free it."""
    for collective in (
        _fsdp_collectives.DefaultAllGather,
        _fsdp_collectives.DefaultReduceScatter,
    ):
        own: Callable[..., Any] = collective.__call__

        def waited(self: Any, *args: Any, own: Callable[..., Any] = own, **kwargs: Any) -> None:
            work = own(self, *args, **{**kwargs, "async_op": True})
            work.wait()
            time.sleep(0.02)

        collective.__call__ = waited  # type: ignore[method-assign]


def spread(
    model: nn.Module,
    sharding: str,
    layer: str,
    reshard: bool | None,
    dtypes: dict[str, Any],
) -> nn.Module:
    """What is trained: the model itself, of sharded layers, or DDP around it."""
    if sharding == "ddp":
        return DistributedDataParallel(model)
    policy = MixedPrecisionPolicy(**dtypes)
    for module in [m for m in model.modules() if type(m).__name__ == layer]:
        fully_shard(module, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, reshard_after_forward=reshard, mp_policy=policy)
    return model


def planned(model: nn.Module, batch: Any, share: float, **options: Any) -> Plan:
    """Into a share of what the step adds unplanned, or the least that it can do with."""
    free = plan(model, 1 << 40, batch, **options).predicted
    budget = free.resident_bytes + share * (free.unplanned_peak_bytes - free.resident_bytes)
    try:
        return plan(model, int(budget), batch, **options)
    except InfeasibleBudget as error:
        return plan(model, error.minimum_bytes, batch, **options)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main(name: str, sharding: str, share: str, optimizer: str, *more: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    let_go_at_once()
    torch.manual_seed(0)
    model, batch, layer = {"llama": llama, "bert": bert, "lora": lora}[name]()
    other = copy.deepcopy(model.train())
    reshard = True if "always" in more else False if "never" in more else None
    dtypes: dict[str, Any] = {}
    if "mixed" in more or "low" in more:
        dtypes["param_dtype"] = torch.bfloat16
    if "mixed" in more:
        dtypes["reduce_dtype"] = torch.float32
    made = planned(
        model, batch, float(share), optimizer=optimizer, costs="roofline", sharding=sharding,
        world_size=2, wrap=[layer] if sharding == "fsdp2" else None, keep_gradients="kept" in more,
        reshard_after_forward=reshard, **dtypes,
    )  # fmt: skip
    apply(made, model)
    updates: dict[nn.Module, torch.optim.Optimizer] = {}
    trained = {m: spread(m, sharding, layer, reshard, dtypes) for m in (model, other)}
    for m in trained:
        updates[m] = torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), 1e-2)

    def before(m: nn.Module = model) -> None:
        if "kept" not in more:
            m.zero_grad()

    def step(m: nn.Module = model) -> torch.Tensor:
        torch.manual_seed(5)
        loss: torch.Tensor = trained[m](**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        updates[m].step()
        return loss

    for _ in range(3):
        before(other)
        step(other)
    peak = measure_peak(step, before=before, warmup=2)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    predicted = made.predicted
    report = {
        "predicted_bytes": predicted.peak_bytes - predicted.resident_bytes,
        "measured_bytes": peak.peak_bytes,
        "allowed_bytes": made.budget_bytes - predicted.resident_bytes,
        "actions": sorted({region.action for region in made.regions}),
        "equal": all(torch.equal(local(p), local(q)) for p, q in pairs),
        "learnt": any(p.grad is not None and bool(local(p.grad).any()) for p, _ in pairs),
    }
    sys.stdout.write(json.dumps(report) + "\n")  # in one piece, beside the other process's
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
