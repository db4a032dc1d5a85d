"""What an optimizer holds and allocates is inside the budget, or the optimizer is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from memfit.integrations import apply
from memfit.planner import Batch, InfeasibleBudget, plan
from memfit.planner.batches import make_batch
from memfit.planner.errors import CaptureError
from memfit.planner.optimizers import OptimizerError
from tests.optimizer_steps import KBIT, OPTIMIZERS, llama, prepared

# Of transformers, about what peft asks it.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROOT = Path(__file__).parents[1]
# Scalars: of which of them torch frees first, a few bytes hang.
CLOSE = 16


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.optimizer_steps"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", [*OPTIMIZERS, KBIT])
def test_the_peak_of_a_step_is_the_predicted_one(
    case: str, steps: dict[str, dict[str, Any]]
) -> None:
    found = steps[case]
    assert found["predicted"] == pytest.approx(found["measured"], abs=CLOSE)
    assert found["measured"] <= found["budget"]


# -- peft's preparation for quantized weights ----------------------------------------------------


def test_adapters_on_a_prepared_model_learn_the_same() -> None:
    plain, planned = (prepared(use_gradient_checkpointing=False) for _ in range(2))
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    batch, _ = make_batch(plain, Batch(2, 32))
    options: dict[str, Any] = {"optimizer": "adamw", "costs": "roofline"}
    with pytest.raises(InfeasibleBudget) as error:
        plan(planned, 1, batch, **options)
    made = plan(planned, error.value.minimum_bytes, batch, **options)
    assert any(region.action != "keep" for region in made.regions)
    apply(made, planned)
    for model in (plain, planned):
        for _ in range(2):  # the first is recorded, the second replayed
            model.zero_grad()
            model(**batch).loss.backward()
    theirs, gradients = (
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for model in (plain, planned)
    )
    assert {n for n, _ in plain.named_parameters() if "lora_" in n} == gradients.keys()
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in gradients.items())
    assert all(g.any() for name, g in gradients.items() if "lora_B" in name)


def test_its_checkpointing_is_noticed() -> None:
    model = prepared()
    with pytest.raises(CaptureError, match="use_gradient_checkpointing=False"):
        plan(model, "1GiB", Batch(1, 8))


# -- bitsandbytes --------------------------------------------------------------------------------


class Rounded(torch.optim.Optimizer):
    """As optimizers of bitsandbytes: state of few bits, and a table that all parameters share."""

    def __init__(self, params: Any, bits: int = 32, is_paged: bool = False) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.bits, self.is_paged = bits, is_paged
        values = torch.linspace(0.1, 1, 256).tolist()
        self.tables = {"dynamic": torch.tensor(values)}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self.state:
                    dtype = torch.uint8 if self.bits == 8 else torch.float32
                    state = torch.zeros_like(p, dtype=dtype)
                    self.state[p] = {"state": state, "table": self.tables["dynamic"]}


def test_state_is_of_the_bits_that_an_optimizer_was_made_with() -> None:
    model = llama()
    elements = sum(p.numel() for p in model.parameters())
    without = plan(model, 2**40, Batch(1, 8)).predicted.resident_bytes
    for bits in (8, 32):
        made = plan(model, 2**40, Batch(1, 8), optimizer=Rounded(model.parameters(), bits))
        assert made.predicted.resident_bytes - without == elements * bits // 8 + 4 * 256


def test_what_bitsandbytes_hides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rounded, "__module__", "bitsandbytes.optim.rounded")
    model = llama()
    eight, paged = Rounded(model.parameters(), 8), Rounded(model.parameters(), 8, is_paged=True)
    with pytest.raises(OptimizerError, match="on a CPU, which a plan does not see; plan for a GPU"):
        plan(model, 2**40, Batch(1, 8), optimizer=eight, device="cpu")
    with pytest.raises(OptimizerError, match=r"Rounded is paged: .* take one that is not"):
        plan(model, 2**40, Batch(1, 8), optimizer=paged, device="h100")
    assert plan(model, 2**40, Batch(1, 8), optimizer=eight, device="h100").workload.optimizer


def test_eight_bit_state_is_counted_as_bitsandbytes_allocates_it() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llama()
    without = plan(model, 2**40, Batch(1, 8), device="h100").predicted.resident_bytes
    for optimizer in (
        bitsandbytes.optim.AdamW8bit(model.parameters()),
        bitsandbytes.optim.AdamW(model.parameters(), optim_bits=8),
    ):
        made = plan(model, 2**40, Batch(1, 8), optimizer=optimizer, device="h100")
        batch, _ = make_batch(model, Batch(1, 8))
        model(**batch).loss.backward()
        optimizer.step()
        states = (t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
        sizes = {t.data_ptr(): t.nbytes for t in states}.values()
        # A GPU allocates multiples of 512 bytes.
        expected = sum(-(-size // 512) * 512 for size in sizes)
        assert made.predicted.resident_bytes - without == expected
