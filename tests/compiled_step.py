"""The step of ``test_compiling``: a planned model under inductor, measured.

    python -m tests.compiled_step SHARE...

Plans a Llama into each share of what an eager step adds, less a tenth, and prints a JSON line: the
bytes of the share, of the predicted peak and of the one that the allocator saw in the compiled
step, and how far its gradients are from those of the same model without plan and compiler,
relative to the largest. Each share is measured in a fork, since a process can measure only once.
"""

import copy
import json
import sys
from typing import Any

import torch
import transformers

from benchmarks.measure import measure_peak
from benchmarks.processes import forks
from memfit.integrations import apply
from memfit.planner import Batch, plan
from memfit.planner.batches import make_batch


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def measure(request: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    plain = llama()
    planned = copy.deepcopy(plain)
    batch, _ = make_batch(plain, Batch(4, 128))
    everything = plan(planned, 2**40, batch, costs="roofline").predicted
    resident = everything.resident_bytes
    budget = int(request["share"] * (everything.unplanned_peak_bytes - resident))
    made = plan(planned, resident + int(0.9 * budget), batch, costs="roofline")
    apply(made, planned)

    compiled: Any = torch.compile(planned)

    def step() -> None:
        compiled(**batch).loss.backward()

    step()  # compiles, and records the regions
    planned.zero_grad()
    step()
    plain(**batch).loss.backward()
    errors = [
        (one.grad - other.grad).abs().max() / other.grad.abs().max()
        for one, other in zip(planned.parameters(), plain.parameters(), strict=True)
    ]
    peak = measure_peak(step, before=planned.zero_grad)
    return {
        "share": request["share"],
        "actions": [region.action for region in made.regions],
        "budget": budget,
        "predicted": made.predicted.peak_bytes - resident,
        "measured": peak.peak_bytes,
        "error": float(max(errors)),
    }


def main(shares: list[str]) -> None:
    requests = [{"share": float(share)} for share in shares]
    for _, result in forks(measure, requests, jobs=1, seconds=300):
        if isinstance(result, Exception):
            raise result
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
