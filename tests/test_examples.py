"""The examples run as their docstrings say, and train the same with a plan as without."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
LEAVING = str(Path(__file__).parent / "leave_at_once.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", LEAVING)


def run(name: str, *options: str, launcher: tuple[str, ...] = ()) -> tuple[str, str]:
    """The line with the losses, and all of the output."""
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (losses,) = (line for line in done.stdout.splitlines() if line.startswith("losses"))
    return losses, done.stdout + done.stderr


def test_a_loop_with_accumulation_clipping_and_autocast() -> None:
    planned, output = run("loop.py")
    assert planned == run("loop.py", "--without")[0]
    assert "planned peak" in output and " 0.0% more" not in output


def test_the_trainer_with_adapters() -> None:
    """Alone; and with two processes the budget is that of each, gradient buckets included."""
    _, output = run("trainer.py")
    assert output.count("planned into") == 1
    planned, output = run("trainer.py", launcher=TORCHRUN)
    assert output.count("planned into") == 2
    assert ", 0.0 % recomputed" not in output
    assert planned == run("trainer.py", "--without", launcher=TORCHRUN)[0]


def test_two_processes_with_fsdp2() -> None:
    planned, output = run("fsdp.py", launcher=TORCHRUN)
    assert output.count("planned peak") == 2 and " 0.0% more" not in output
    assert planned == run("fsdp.py", "--without", launcher=TORCHRUN)[0]


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"fsdp.py", "loop.py", "trainer.py"}
