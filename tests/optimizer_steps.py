"""The steps of ``test_optimizers``, planned and measured.

    python -m tests.optimizer_steps

Prints a JSON object: for each case the bytes of the budget, of the predicted peak and of the one
that the allocator saw. Each case runs in a fork, since a process can measure only once.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn, optim

from benchmarks.measure import measure_peak
from benchmarks.processes import forks
from memfit.integrations import apply
from memfit.planner import Batch, InfeasibleBudget, Plan, plan
from memfit.planner.batches import make_batch

Weights = list[nn.Parameter]

OPTIMIZERS: dict[str, Callable[[Weights], optim.Optimizer]] = {
    "adamw": optim.AdamW,
    "adamw, foreach": lambda w: optim.AdamW(w, foreach=True),
    "adamw, fused": lambda w: optim.AdamW(w, fused=True),
    "sgd": lambda w: optim.SGD(w, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd, fused": lambda w: optim.SGD(w, momentum=0.9, fused=True),
    "adafactor": optim.Adafactor,
    "adafactor, foreach": lambda w: optim.Adafactor(w, foreach=True),
    "adafactor of transformers": lambda w: transformers.Adafactor(  # type: ignore[no-untyped-call]
        w, lr=1e-3, scale_parameter=False, relative_step=False
    ),
}
KBIT = "prepared for few bits"


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def prepared(**options: Any) -> nn.Module:
    """A Llama as for QLoRA, but for the quantized weights, which take a library of their own."""
    model = llama().bfloat16()
    model.is_loaded_in_8bit = True
    prepare_model_for_kbit_training(model, **options)  # type: ignore[no-untyped-call]
    model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()


def measure(request: Any) -> dict[str, Any]:
    case = request["case"]
    model = prepared(use_gradient_checkpointing=False) if case == KBIT else llama()
    optimizer = OPTIMIZERS.get(case, optim.AdamW)(
        [p for p in model.parameters() if p.requires_grad]
    )
    # Of so few tokens that it is the optimizer's step that peaks; of more for adapters.
    batch, _ = make_batch(model, Batch(4, 64) if case == KBIT else Batch(1, 8))
    made = _planned(model, optimizer, batch, least=case == KBIT)
    apply(made, model)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()

    peak = measure_peak(step, before=optimizer.zero_grad)
    resident = made.predicted.resident_bytes
    return {
        "budget": made.budget_bytes - resident,
        "predicted": made.predicted.peak_bytes - resident,
        "measured": peak.peak_bytes,
        "at": made.predicted.peak_at,
    }


def _planned(model: nn.Module, optimizer: optim.Optimizer, batch: Any, *, least: bool) -> Plan:
    """Into the smallest budget, or one in which everything fits."""
    into = partial(plan, batch=batch, optimizer=optimizer, costs="roofline")
    try:
        return into(model, 1 if least else 2**40)
    except InfeasibleBudget as error:
        return into(model, error.minimum_bytes)


def main() -> None:
    torch.set_num_threads(1)
    plan(
        llama(), 2**40, Batch(1, 8), optimizer="adamw", costs="roofline"
    )  # imports what forks need
    requests = [{"case": case} for case in (*OPTIMIZERS, KBIT)]
    results = {}
    for request, result in forks(measure, requests, jobs=1, seconds=60):
        if isinstance(result, Exception):
            raise result
        results[request["case"]] = result
    print(json.dumps(results))


if __name__ == "__main__":
    main()
