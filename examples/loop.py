"""Trains a small BERT in a loop of one's own: bf16 autocast, accumulation, clipping, a budget.

    python examples/loop.py [--budget 12MiB] [--without]

``--without`` trains the same without a plan: the losses are the same.
"""

import argparse

import torch
from transformers import BertConfig, BertForSequenceClassification

from memfit.integrations import apply
from memfit.planner import plan

ACCUMULATE = 2
MAX_NORM = 1.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="12MiB", help="peak of all memory of a step")
    parser.add_argument("--without", action="store_true", help="train without a plan")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_attention_heads=2,
            vocab_size=512,
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # The longest batch that will come; shorter ones run under the same plan.
    batches = [_batch(seed, length) for seed, length in enumerate((128, 96, 128, 64))]
    if not options.without:
        made = plan(
            model, options.budget, batches[0], optimizer=optimizer, autocast="bfloat16",
            keep_gradients=True, max_grad_norm=MAX_NORM,
        )  # fmt: skip
        apply(made, model)
        print(f"planned peak {made.predicted.peak_bytes} bytes, {made.predicted.overhead:.1%} more")
    losses = []
    for number, batch in enumerate(batches * 2, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss / ACCUMULATE
        loss.backward()
        losses.append(loss.item())
        if number % ACCUMULATE == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    print("losses", *losses)


def _batch(seed: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 512, (4, length), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2}


if __name__ == "__main__":
    main()
