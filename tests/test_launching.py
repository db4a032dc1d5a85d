"""``accelerate launch``: every process of a Trainer plans its own step and learns the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
# On a CPU accelerate starts several processes by MPI alone, unless told that they are for GPUs.
LAUNCH = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip
# The Trainer copies a batch of 4 rows of 64 ids, and 4 labels, from "cpu" to "cpu:0".
BATCH_BYTES = 4 * 64 * 8 + 4 * 8


def launch(*options: str) -> list[dict[str, Any]]:
    """What each process reports of its training."""
    tests = ROOT / "tests"
    done = subprocess.run(
        [
            *(sys.executable, "-m", *LAUNCH, str(tests / "leave_at_once.py")),
            *(str(tests / "launched_training.py"), *options),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": PATH},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def test_ddp() -> None:
    reports = launch("bert")
    assert len(reports) == 2
    for report in reports:
        assert_planned_and_the_same(report)
        assert report["sharding"] == "ddp" and report["actions"] == ["selective"]
        assert report["measured_bytes"] - report["predicted_bytes"] <= BATCH_BYTES + 128


def test_fsdp2() -> None:
    reports = launch("llama", json.dumps({"fsdp": True}))
    assert len(reports) == 2
    for report in reports:
        assert_planned_and_the_same(report)
        assert report["sharding"] == "fsdp2" and "selective" in report["actions"]
        assert "LlamaDecoderLayer" in report["wrap"]
        # The Trainer holds a loss of 4 bytes.
        assert report["measured_bytes"] - report["predicted_bytes"] == 4


def assert_planned_and_the_same(report: dict[str, Any]) -> None:
    assert report["equal"] and report["steps"] == 4
    assert report["predicted_bytes"] <= report["measured_bytes"] <= report["allowed_bytes"]
