"""What the benchmarks measure with is right: peaks against toys that are counted by hand.

Every case runs in a process of its own, since a CPU's peak can be measured once in each.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MIB = 2**20

BEGIN = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch.utils.checkpoint import checkpoint
from benchmarks.measure import *
MIB = 2**20
def nothing(): pass
before = nothing
def allocate(count): return torch.empty(count * MIB, dtype=torch.uint8)
"""
PEAK = """
peak = measure_peak(step, before=before)
print(json.dumps([peak.peak_bytes, peak.final_bytes]))
"""

# Code that defines a step, its peak and what is left of it, in MiB.
TOYS = {
    "sequence": (
        """
def step():
    a = allocate(10)
    b = allocate(20)
    del a
    c = allocate(5)
    d = allocate(40)  # the peak: 20 + 5 + 40
    del b, d
    e = allocate(30)
""",
        65,
        0,
    ),
    # What the step before it left and this one frees was never counted, so it is not subtracted.
    "something stays": (
        """
kept = []
def step():
    kept.clear()
    kept.append(allocate(7))
    allocate(3)
""",
        10,
        7,
    ),
    # Tensors of 4 MiB. x * w is freed once exp has run, which saves its own output y; so does the
    # second exp, z. Backward: y, z and a new gradient of 4; then y, the gradient before and after.
    "autograd": (
        """
x, w = torch.randn(MIB), torch.randn(MIB, requires_grad=True)
def step(): (x * w).exp().exp().sum().backward()
def before(): w.grad = None
""",
        12,
        4,
    ),
    # Eight saved outputs of 4 MiB, and one gradient in the backward.
    "eight tanh": (
        """
x = torch.randn(MIB, requires_grad=True)
def step():
    h = x
    for _ in range(8): h = torch.tanh(h)
    loss = h.sum()
    del h
    loss.backward()
def before(): x.grad = None
""",
        36,
        4,
    ),
    # Only what is between the halves is saved: 4. The second half is recomputed: 16 and a gradient.
    "eight tanh, checkpointed": (
        """
x = torch.randn(MIB, requires_grad=True)
def half(h):
    for _ in range(4): h = torch.tanh(h)
    return h
def step():
    h = checkpoint(half, checkpoint(half, x, use_reentrant=False), use_reentrant=False)
    loss = h.sum()
    del h
    loss.backward()
def before(): x.grad = None
""",
        24,
        4,
    ),
}


def run(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", TOYS)
def test_peaks_of_toys(name: str) -> None:
    code, peak, final = TOYS[name]
    # Scalars, and the generator's state that a checkpoint saves, are some kilobytes.
    assert run(code + PEAK) == pytest.approx([peak * MIB, final * MIB], abs=16 * 1024)


def test_contestants_take_turns() -> None:
    code = """
ran = []
contestants = {n: Contestant(lambda n=n: ran.append(n), lambda n=n: ran.append("-")) for n in "ab"}
timings = time_steps(contestants, rounds=2)
print(json.dumps([ran, {n: len(t.seconds) for n, t in timings.items()}]))
"""
    assert run(code) == [[*"-a-b-b-a-a-b"], {"a": 2, "b": 2}]


def test_ratios_are_paired() -> None:
    code = """
slow, fast = Timing((2.0, 8.0, 9.0)), Timing((1.0, 2.0, 3.0))
print(json.dumps([slow.ratios(fast), slow.ratio(fast), slow.median_seconds]))
"""
    assert run(code) == [[2.0, 4.0, 3.0], 3.0, 8.0]


def test_a_single_bit_is_a_difference() -> None:
    code = """
def outcome(shift=0.0, name="weight", loss=1.0):
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight.grad = torch.ones(4, 4)
    model.weight.grad[0, 0] += shift
    made = outcome_of(model, torch.tensor(loss))
    return Outcome(made.loss, {name: made.gradients["weight"]})
others = [outcome(), outcome(2**-23), outcome(name="bias"), outcome(loss=1 + 2**-23),
          outcome(float("nan"))]
print(json.dumps([bitwise_equal(outcome(), other) for other in others]))
"""
    assert run(code) == [True, False, False, False, False]


def test_outcomes_outlive_the_gradients() -> None:
    code = """
model = torch.nn.Linear(4, 4, bias=False)
model.weight.grad = torch.ones(4, 4)
made = outcome_of(model, torch.tensor(1.0))
model.weight.grad.zero_()
print(json.dumps(made.gradients["weight"].sum().item()))
"""
    assert run(code) == 16.0
