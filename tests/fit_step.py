"""One step of ``test_fitting``, planned and measured: a process can do so once.

    python tests/fit_step.py MODEL BATCH BUDGET

The budget is the smallest that has a plan where none keeps the one that is given. Prints the bytes
of the step's peak, what is resident included.
"""

import sys

import torch

from benchmarks.measure import measure_peak
from memfit.integrations import apply
from memfit.integrations.models import build_model
from memfit.planner import Batch, InfeasibleBudget, plan
from memfit.planner.batches import make_batch

LENGTH = 32


def main(config: str, size: str, budget: str) -> None:
    torch.set_num_threads(1)
    model = build_model(config).to_empty(device="cpu").train()
    model.tie_weights()  # type: ignore[operator]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in model.buffers():
        buffer.zero_()
    batch, _ = make_batch(model, Batch(int(size), LENGTH))
    try:
        made = plan(model, int(budget), batch, costs="roofline")
    except InfeasibleBudget as error:
        made = plan(model, error.minimum_bytes, batch, costs="roofline")
    apply(made, model)

    def step() -> None:
        model(**batch).loss.backward()

    peak = measure_peak(step, before=lambda: model.zero_grad())
    print(made.predicted.resident_bytes + peak.peak_bytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
