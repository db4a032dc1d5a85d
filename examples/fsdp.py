"""Trains a small Llama sharded over two processes with FSDP2, each within a budget.

    torchrun --nproc-per-node 2 examples/fsdp.py [--budget 9MiB] [--without]

``--without`` trains the same without a plan: the losses are the same.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from memfit.integrations import apply
from memfit.planner import plan


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="9MiB", help="peak of a step, in each process")
    parser.add_argument("--without", action="store_true", help="train without a plan")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=512,
        )
    ).train()  # fmt: skip
    model.to(device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = [_batch(generator, device) for _ in range(3)]
    if not options.without:
        # Of each process: its batch, its shards, and the layers that are gathered around it.
        made = plan(
            model, options.budget, batches[0], optimizer="adamw", sharding="fsdp2",
            world_size=dist.get_world_size(),
        )  # fmt: skip
        apply(made, model)
        print(f"planned peak {made.predicted.peak_bytes} bytes, {made.predicted.overhead:.1%} more")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses.append(loss.item())
    if dist.get_rank() == 0:
        print("losses", *losses)
    dist.destroy_process_group()


def _batch(generator: torch.Generator, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (4, 128), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    main()
