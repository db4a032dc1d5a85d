"""Says in words where a step peaks and what is alive there. Depends on the step's records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from memfit.planner.regions import Region
from memfit.planner.simulate import Timeline
from memfit.planner.step_graph import Phase, StepGraph

# What no storage of the step stands for.
_OF_THE_PLAN = "generator states and samples"


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment with the most bytes alive."""

    where: str
    alive_bytes: dict[str, int]
    """Bytes by what they hold, largest first."""


def describe_peak(step: StepGraph, regions: Sequence[Region], timeline: Timeline) -> Peak:
    """Where ``timeline`` peaks, and the bytes alive there by kind."""
    slot = timeline.peak_slot
    alive: Counter[str] = Counter()
    for storage, size in timeline.alive_at(slot):
        alive[step.storages[storage].kind.value if storage >= 0 else _OF_THE_PLAN] += size
    op = int(timeline.ops[slot])
    if step.ops[op].workspace_bytes:
        alive["workspace"] += step.ops[op].workspace_bytes
    region = int(timeline.recomputed[slot])
    where = f"recomputation of {regions[region].name}" if region >= 0 else _where(step, regions, op)
    return Peak(where, dict(alive.most_common()))


def _where(step: StepGraph, regions: Sequence[Region], op: int) -> str:
    phase: Phase = step.ops[op].phase
    if phase is Phase.OPTIMIZER:
        return str(phase.value)
    for region in regions:
        spans = {
            Phase.FORWARD: (region.start, region.stop),
            Phase.BACKWARD: (region.backward_start, region.backward_stop),
        }
        start, stop = spans[phase]
        if start <= op < stop:
            return f"{phase.value} of {region.name}"
    if phase is Phase.BACKWARD and regions and op >= max(r.backward_stop for r in regions):
        return "end of the backward"
    module = _module(step, op)
    return f"{phase.value} of {module}" if module else f"{phase.value} of the loss"


def _module(step: StepGraph, op: int) -> str:
    """FQN of the module that an op belongs to; of a backward op, by the tensor unpacked for it."""
    if step.ops[op].phase is Phase.FORWARD:
        return step.calls[step.ops[op].call].module if step.ops[op].call >= 0 else ""
    unpacked = [i for i, s in enumerate(step.saved) if s.unpacked is not None and s.unpacked <= op]
    if not unpacked:
        return ""
    last = max(unpacked, key=lambda i: (step.saved[i].unpacked, -i))
    inner = [c for c in step.calls if last in c.saved]
    return max(inner, key=lambda c: c.start).module if inner else ""
