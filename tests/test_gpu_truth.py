"""What decides whether a row that was measured on a GPU passes; no GPU is needed to test that."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu_truth
from benchmarks.gpu_truth import APART, EXCESSES, HERE, Row
from benchmarks.measure import Outcome
from benchmarks.processes import MeasurementFailed
from benchmarks.resuming import Remembered
from benchmarks.training import Trainer

ROW = Row(
    model="bert",
    share=0.5,
    made=HERE,
    at_minimum=False,
    budget_bytes=1010,
    predicted_bytes=1000,
    measured_bytes=1000,
    before_bytes=100,
    reserved_bytes=1200,
    excess=0.0,
    equal="yes",
    difference=0.0,
    noise=0.0,
    predicted_overhead=0.1,
    recomputed=1,
    regions=4,
    plan_seconds=1.0,
)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"measured_bytes": 1004}, True),
        ({"measured_bytes": 1008}, False),
        ({"measured_bytes": 1008, "made": APART}, True),
        ({"predicted_bytes": 1011, "measured_bytes": 1011}, False),
        ({"excess": 0.01}, False),
        ({"excess": None, "reserved_bytes": None}, True),
        ({"equal": "noisy"}, True),
        ({"equal": "no"}, False),
    ],
)
def test_a_row_passes_if_it_is_true_within_budget_and_equal(
    change: dict[str, Any], passes: bool
) -> None:
    assert replace(ROW, **change).passes is passes
    assert len(replace(ROW, **change).cells()) == len(gpu_truth.HEADERS)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[int]]:
    """Stands in for a GPU of 100 MiB, of which the process has 10 and a step needs some."""

    def install(step_bytes: int, reserved_bytes: int = 10 << 20) -> list[int]:
        free_bytes = (100 << 20) - reserved_bytes
        ballasts: list[int] = []

        def empty(count: int, **_: object) -> object:
            ballasts.append(count)
            return object()

        def step(_: Trainer) -> None:
            if step_bytes > free_bytes - ballasts[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory")

        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 100 << 20))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved_bytes)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(Trainer, "step", step)
        return ballasts

    return install


@pytest.mark.parametrize(
    ("budget", "step", "excess"),
    [(50, 40, 0.0), (50, 41, 0.005), (50, 43, 0.05), (50, 100, 1.0), (150, 90, 0.0)],
)
def test_the_ballast_leaves_the_budget_and_then_more(
    gpu: Callable[[int], list[int]], budget: int, step: int, excess: float
) -> None:
    trainer = Trainer(nn.Linear(2, 2), {})
    ballasts = gpu(step << 20)
    assert gpu_truth.find_excess(trainer, budget << 20) == excess
    assert ballasts[0] == max(0, 100 - budget) << 20
    assert len(ballasts) == (EXCESSES.index(excess) + 1 if excess in EXCESSES else len(EXCESSES))
    assert ballasts == sorted(ballasts, reverse=True)


class _Stepping(Trainer):
    """Its steps have the given gradients, one after the other."""

    def __init__(self, *gradients: float) -> None:
        super().__init__(nn.Linear(1, 1), {})
        self.gradients = list(gradients)

    def outcome(self) -> Outcome:
        return Outcome(torch.tensor(1.0), {"weight": torch.tensor([3.0, self.gradients.pop(0)])})


@pytest.mark.parametrize(
    ("gradients", "equal"),
    [
        ((4.0, 4.0), "yes"),
        ((4.0, 4.5, 4.0, 4.0), "no"),
        ((4.0, 4.2, 4.0, 4.3), "noisy"),
        ((4.0, 5.0, 4.1, 4.2), "no"),
    ],
)
def test_gradients_may_differ_as_those_of_the_unplanned_step_do(
    gradients: tuple[float, ...], equal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_truth, "apply", lambda *_: nullcontext())
    verdict, difference, noise = gpu_truth._compare(_Stepping(*gradients), ROW)  # type: ignore[arg-type]
    assert verdict == equal
    if verdict != "yes":
        assert difference == pytest.approx(abs(gradients[1] - 4.0) / 5)
        assert noise == pytest.approx(max(abs(g - 4.0) for g in gradients[2:]) / 5)


def test_a_gradient_that_is_missing_is_as_far_as_all() -> None:
    one, other = (Outcome(torch.tensor(1.0), {name: torch.ones(1)}) for name in "ab")
    assert gpu_truth.distance(one, other) == 1.0


def test_measurements_are_remembered_but_for_those_of_other_versions(tmp_path: Path) -> None:
    asked: list[Any] = []

    def measure(request: Any) -> dict[str, Any]:
        asked.append(request)
        return {"seen": len(asked)}

    path = tmp_path / "measured.jsonl"
    assert Remembered(path, measure, "cpu", float("inf"))({"a": 1, "b": 2}) == {"seen": 1}
    late = Remembered(path, measure, "cpu", 0.0)
    assert late({"b": 2, "a": 1}) == {"seen": 1}
    with pytest.raises(MeasurementFailed, match="time is up"):
        late({"a": 2})
    record = json.loads(path.read_text())
    record["by"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record) + '\n{"request": {"a": 1, "b"')
    assert Remembered(path, measure, "cpu", float("inf"))({"a": 1, "b": 2}) == {"seen": 2}
    assert Remembered(path, measure, "cpu", 0.0)({"a": 1, "b": 2}) == {"seen": 2}
    assert len(asked) == 2
