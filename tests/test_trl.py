"""``MemfitCallback`` in the ``SFTTrainer`` of TRL, which has a head and a loss of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from memfit.integrations import ApplyError, MemfitCallback
from tests import sft_run

# Of TRL, about itself and about what it asks of others.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROOT = Path(__file__).parents[1]


def test_what_is_learned_stays_the_same_and_the_peak_is_the_predicted_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sft_run"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"]
    assert "selective" in found["actions"]
    assert found["measured"] <= found["budget"] < found["unplanned"]
    assert found["measured"] - found["peak"] == pytest.approx(0, abs=512)


def test_adapters_learn_the_same() -> None:
    options: dict[str, Any] = {
        "bf16": False,
        "lora": peft.LoraConfig(r=4, target_modules="all-linear"),
        "gradient_accumulation_steps": 2,
    }
    losses, weights = sft_run.train([], **options)
    callback = MemfitCallback(sft_run.smallest_budget(**options), costs="roofline")
    planned, learned = sft_run.train([callback], **options)
    assert planned == losses
    assert all(torch.equal(t, learned[name]) for name, t in weights.items())
    assert all(t.any() for name, t in learned.items() if "lora_B" in name), "zeros at first"
    assert callback.plan is not None
    assert any(region.action != "keep" for region in callback.plan.regions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "activation_checkpointing=True in SFTConfig checkpoints every layer, .* pass "
             "activation_checkpointing=False and keep MemfitCallback"),
        ({"activation_checkpointing": False, "activation_offloading": True},
         "activation_offloading=True in SFTConfig takes activations off the device"),
        ({"activation_checkpointing": False, "label_smoothing_factor": 0.1},
         "label_smoothing_factor=0.1 makes the Trainer compute the loss .* set it to 0"),
    ],
    ids=["checkpointing", "offloading", "smoothing"],
)  # fmt: skip
def test_what_a_plan_cannot_run_beside_is_refused_when_the_trainer_is_made(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApplyError, match=message):
        sft_run.trainer(sft_run.llama(), [MemfitCallback("1GiB")], **options)
