"""Says in words where in the step an op runs. Depends on the step's records."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

from memfit.planner.regions import Region
from memfit.planner.step_graph import Phase, StepGraph


class Places:
    """Where the ops of a step run."""

    def __init__(self, step: StepGraph, regions: Sequence[Region]) -> None:
        self._step = step
        self._regions = regions

    def of_slot(self, op: int, recomputed_region: int) -> str:
        """Where a slot of the planned step is; the region is -1 for the step's own ops."""
        if recomputed_region >= 0:
            return f"recomputation of {self._regions[recomputed_region].name}"
        return self._of_op[op]

    def module(self, op: int) -> str:
        """FQN of an op's module; of a backward op, by the tensor that was last unpacked for it."""
        step = self._step
        if step.ops[op].phase is Phase.FORWARD:
            return step.calls[step.ops[op].call].module if step.ops[op].call >= 0 else ""
        place = bisect_right(self._unpacked, (op, 1)) - 1
        if step.ops[op].phase is Phase.OPTIMIZER or place < 0:
            return ""
        call = self._callers[-self._unpacked[place][1]]
        return step.calls[call].module if call >= 0 else ""

    @cached_property
    def _of_op(self) -> list[str]:
        places = [""] * len(self._step.ops)
        for region in reversed(self._regions):  # the first one that holds an op names it
            for phase, start, stop in (
                (Phase.FORWARD, region.start, region.stop),
                (Phase.BACKWARD, region.backward_start, region.backward_stop),
            ):
                name = f"{phase.value} of {region.name}"
                for op in range(start, stop):
                    if self._step.ops[op].phase is phase:
                        places[op] = name
        return [place or self._outside(op) for op, place in enumerate(places)]

    def _outside(self, op: int) -> str:
        """Where an op is when it is in no region."""
        phase: Phase = self._step.ops[op].phase
        if phase is Phase.OPTIMIZER:
            return str(phase.value)
        if phase is Phase.BACKWARD and self._regions and op >= self._regions_end:
            return "end of the backward"
        return f"{phase.value} of {self.module(op) or 'the loss'}"

    @cached_property
    def _regions_end(self) -> int:
        return max(region.backward_stop for region in self._regions)

    @cached_property
    def _unpacked(self) -> list[tuple[int, int]]:
        """Clock at which each saved tensor was unpacked, and its index below zero, in order."""
        saved = enumerate(self._step.saved)
        return sorted((s.unpacked, -i) for i, s in saved if s.unpacked is not None)

    @cached_property
    def _callers(self) -> list[int]:
        """The innermost module call that saved each tensor; -1 outside of any."""
        callers = [-1] * len(self._step.saved)
        for index, call in enumerate(self._step.calls):  # inner calls come after outer ones
            callers[call.saved.start : call.saved.stop] = [index] * len(call.saved)
        return callers
