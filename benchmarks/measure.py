"""Measures one training step without knowing how it works: its peak, its time, its results.

Peak on a CPU: the running sum of the allocator's own ``[memory]`` events, one for each malloc and
free, so its highest value is what the step adds at most to what was allocated before. Three rules:
a process measures only once (the profiler's table of pointers goes stale between sessions); what
was allocated before the step must not be freed in it (such a free has no size, so set gradients to
None before); memory that bypasses the allocator (oneDNN's scratchpads) is not seen. Peak on CUDA:
``torch.cuda.max_memory_allocated``. Depends on torch alone.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes of one step, above what was allocated when it began."""

    peak_bytes: int
    final_bytes: int
    """What is still allocated at its end: gradients, and what the step leaves alive."""
    before_bytes: int | None
    """What was allocated when it began; a CPU's allocator does not tell."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A step to be timed, and what prepares each run of it outside of the clock."""

    step: Run
    before: Run = _nothing


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a contestant's runs; run i is neighbour to run i of the other contestants."""

    seconds: tuple[float, ...]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    def ratios(self, other: "Timing") -> list[float]:
        """Seconds over the other's, pair by pair: what slows the machine hits both of a pair."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]

    def ratio(self, other: "Timing") -> float:
        """The median of the paired ratios."""
        return statistics.median(self.ratios(other))


def measure_peak(
    step: Run, *, before: Run = _nothing, warmup: int = 1, device: str = "cpu"
) -> Peak:
    """Runs ``before`` and ``step`` ``warmup`` times, then once more, measuring the step."""
    for _ in range(warmup):
        before()
        step()
    before()
    gc.collect()
    return _cuda_peak(step) if device == "cuda" else _cpu_peak(step)


def time_steps(
    contestants: Mapping[str, Contestant], *, rounds: int = 7, warmup: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Times the contestants in turns, each round beginning with another one.

    The clock is the CPU time of the process, far steadier on a shared machine than the wall's; on
    CUDA it is the GPU's, by events.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            contestants[name].before()
            taken = clock(contestants[name].step)
            if turn >= warmup:
                seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step computes: the loss and all gradients, where they were computed."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def outcome_of(model: nn.Module, loss: torch.Tensor) -> Outcome:
    """Copies what the step that returned ``loss`` left in the model."""
    gradients = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Outcome(loss.detach().clone(), gradients)


def bitwise_equal(one: Outcome, other: Outcome) -> bool:
    """Whether the loss and every gradient are the same to the bit."""
    return (
        torch.equal(one.loss, other.loss)
        and one.gradients.keys() == other.gradients.keys()
        and all(torch.equal(g, other.gradients[name]) for name, g in one.gradients.items())
    )


def _cpu_peak(step: Run) -> Peak:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    del result
    return peak_seen_by(profiler)


def peak_seen_by(profiler: profile) -> Peak:
    """The peak on a CPU of what ran under a profiler that records memory."""
    live = highest = 0
    for signed_bytes in _memory_events(profiler):
        live += signed_bytes
        highest = max(highest, live)
    return Peak(highest, live, None)


def _memory_events(profiler: profile) -> list[int]:
    """Signed bytes of the allocator's events, in order of time."""
    session = profiler.profiler
    assert session is not None and session.kineto_results is not None
    events = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in session.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    return [signed for _, signed in sorted(events, key=lambda event: event[0])]


def _cuda_peak(step: Run) -> Peak:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    del result
    highest = torch.cuda.max_memory_allocated()
    return Peak(highest - before, torch.cuda.memory_allocated() - before, before)


def _cpu_seconds(step: Run) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


def _cuda_seconds(step: Run) -> float:
    new_event: Any = torch.cuda.Event
    begin, end = (new_event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
