"""Says in words where a step peaks and what is alive there. Depends on the step's records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from memfit.planner.places import Places
from memfit.planner.regions import Region
from memfit.planner.simulate import Timeline
from memfit.planner.step_graph import StepGraph

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
    where = Places(step, regions).of_slot(op, int(timeline.recomputed[slot]))
    return Peak(where, {kind: size for kind, size in alive.most_common() if size})
