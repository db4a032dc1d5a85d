"""Seconds for every op of a captured step, by a roofline over the device table or by measurement.

The roofline takes the longer of computing (FLOPs over the device's peak) and moving (bytes over its
bandwidth), each at the share of the peak that real kernels reach, plus the launch (Williams et al.,
"Roofline", CACM 2009). Depends on the step's records and the device table.
"""

from collections.abc import Mapping
from dataclasses import replace

from memfit.planner.devices import Device
from memfit.planner.step_graph import Op, StepGraph

SAMPLE = "sample"
"""Stands among the signatures for what it takes to sample a tensor and to compare the sample."""
SAMPLE_LAUNCHES = 6


def price(
    step: StepGraph, device: Device, measured: Mapping[str, float] | None = None
) -> StepGraph:
    """``step`` with seconds: measured ones by signature, else the roofline's."""
    seconds = {SAMPLE: SAMPLE_LAUNCHES * device.launch_seconds, **(measured or {})}
    ops = []
    for op in step.ops:
        if op.signature not in seconds:
            seconds[op.signature] = roofline_seconds(op, device)
        taken = seconds[op.signature]
        ops.append(op if op.seconds == taken else replace(op, seconds=taken))
    return replace(step, ops=tuple(ops), recomputation_seconds=seconds[SAMPLE])


def roofline_seconds(op: Op, device: Device) -> float:
    """Seconds of one op; views cost nothing."""
    if not op.flops and not op.moved_bytes:
        return 0.0
    computing = op.flops / (device.peak_flops(op.dtype) * device.compute_efficiency)
    moving = op.moved_bytes / (device.bandwidth_bytes_per_second * device.bandwidth_efficiency)
    return device.launch_seconds + max(computing, moving)
