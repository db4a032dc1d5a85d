"""What can be had without planning: keep all, checkpoint all or every n-th region, or keep what
attention makes and recompute the rest, or keep the inputs of every sqrt(n)-th region alone.

``every_n`` is ``activation_checkpointing_enable(every_n_layers=n)`` of transformers: of the regions
that can be checkpointed, the first and every n-th after it. The budget and the limits play no part
in the choice; the status says whether the choice happens to fit. Depends on the standard library
only.
"""

import math
import time
from collections.abc import Callable

from memfit.solvers.problem import (
    DEFAULT_LIMITS,
    Limits,
    Problem,
    Region,
    Segment,
    Solution,
    Status,
    describe,
)


def none(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Keep every region's activations."""
    return _chosen(problem, "none", lambda position: False)


def full(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Checkpoint every region that can be."""
    return _chosen(problem, "full", lambda position: True)


def every_n(problem: Problem, limits: Limits = DEFAULT_LIMITS, *, n: int) -> Solution:
    """Checkpoint positions ``0, n, 2n, ...`` among the regions that can be."""
    if n < 1:
        raise ValueError(f"every_n needs n >= 1, got {n}")
    return _chosen(problem, f"every_{n}", lambda position: position % n == 0)


def keep_attention(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Keep the results of attention kernels alone, which is what people write by hand for torch's
    selective checkpointing; a region that has no such option is checkpointed."""
    started = time.perf_counter()
    choices = []
    for region in problem.regions:
        attention = _attention(region)
        checkpoint = _find(region, "checkpoint")
        if attention is None:
            attention = _keep(region) if checkpoint is None else checkpoint
        choices.append(attention)
    return _judged(problem, choices, "keep_attention", started)


def sqrt_n(problem: Problem, limits: Limits = DEFAULT_LIMITS) -> Solution:
    """Segments of about sqrt(n) of the n regions, each of which keeps the input of its first region
    (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).

    Unlike there, a segment's regions are recomputed one at a time once they have their inputs.
    What is in no segment is checkpointed.
    """
    started = time.perf_counter()
    choices = list(full(problem.flat()).choices)
    longest = math.ceil(math.sqrt(len(choices)))
    r = 0
    while r < len(choices):
        here = [s for s in problem.segments if s.first == r and len(s.choices) <= longest]
        if not here:
            r += 1
            continue
        segment = min(here, key=lambda s: (-len(s.choices), _stored_bytes(problem, s)))
        choices[r : segment.stop] = segment.choices
        r = segment.stop
    return _judged(problem, choices, "sqrt_n", started)


def _stored_bytes(problem: Problem, segment: Segment) -> int:
    own = zip(problem.regions[segment.first : segment.stop], segment.choices, strict=True)
    return sum(region.options[o].stored_bytes for region, o in own)


def _attention(region: Region) -> int | None:
    """Of the options that keep a result of attention, the one that stores least."""
    having = [
        o
        for o, option in enumerate(region.options)
        if any(name.rsplit(".", 1)[-1].startswith(("sdpa", "bmm")) for name in option.keep)
    ]
    return min(having, key=lambda o: region.options[o].stored_bytes, default=None)


def _chosen(problem: Problem, solver: str, is_checkpointed: Callable[[int], bool]) -> Solution:
    started = time.perf_counter()
    choices, position = [], 0
    for region in problem.regions:
        checkpoint = _find(region, "checkpoint")
        if checkpoint is None:
            choices.append(_keep(region))
            continue
        choices.append(checkpoint if is_checkpointed(position) else _keep(region))
        position += 1
    return _judged(problem, choices, solver, started)


def _judged(problem: Problem, choices: list[int], solver: str, started: float) -> Solution:
    """The choice, its status stating the truth about this one choice and no other."""
    solution = describe(problem, choices, Status.FEASIBLE, solver)
    if solution.peak_bytes > problem.budget_bytes:
        status = Status.INFEASIBLE
    elif solution.recompute_seconds > 0:
        status = Status.FEASIBLE
    else:
        status = Status.OPTIMAL  # nothing recomputes for less than zero seconds
    took = time.perf_counter() - started
    return describe(problem, choices, status, solver, solve_seconds=took)


def _find(region: Region, action: str) -> int | None:
    return next((o for o, option in enumerate(region.options) if option.action == action), None)


def _keep(region: Region) -> int:
    """The option that keeps everything or, for a region without one, that recomputes least."""
    keep = _find(region, "keep")
    if keep is not None:
        return keep
    return min(range(len(region.options)), key=lambda o: region.options[o].recompute_seconds)
