"""What an action does to the life of tensors: what it holds, what it runs again, what that
allocates.

This is the one place that knows how the executor behaves; the options of the solver and the
simulator both read it, which is why the predicted peak can be the measured one. Pure graph logic on
the step's records.

``selective`` has a file of its own. ``checkpoint`` is ``torch.utils.checkpoint`` (non-reentrant):
autograd keeps nothing of the region, the frame keeps the arguments until the last saved tensor of
the region is released; when the backward first asks for one, the region's forward runs again up to
its last saved tensor (early stop), and each recomputed tensor is freed after its own use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memfit.planner.regions import Region
from memfit.planner.step_graph import StepGraph


@dataclass(frozen=True, slots=True)
class Copy:
    """A storage that a recomputation allocates again."""

    storage: int
    """Storage of the forward that it repeats; -1 for a generator state."""
    size_bytes: int
    first: int
    """Position in the recomputation of the op that allocates it."""
    last: int
    """Position before which its references in the recomputation are gone."""
    until: int
    """Clock until which the backward uses it; 0 when it does not."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """Ops that run again just before the op at clock ``at``."""

    at: int
    ops: Sequence[int]
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """How a region is tied to its neighbours in a segment."""

    inputs: frozenset[int]
    """Storages that the region before makes again."""
    given: dict[int, int]
    """Of these, what its own backward needs, with the clock until which it holds them."""
    given_at: int
    """Clock at which its own backward first needs one of them; -1 if it never does."""
    rerun: Recomputation | None
    """How it makes the inputs of the region after it again; when is decided by the segment."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a region under an action does to the step, beside running its ops."""

    holds: dict[int, int]
    """Storages that it keeps alive, with the clock until which it does."""
    extra: tuple[tuple[int, int, int], ...] = ()
    """Further allocations: bytes, first clock, clock at which they are freed."""
    recomputations: tuple[Recomputation, ...] = ()
    """In the order in which they run."""
    chain: Chain | None = None

    def seconds(self, step: StepGraph) -> float:
        """Seconds that its recomputations take."""
        ops = sum(step.ops[i].seconds for r in self.recomputations for i in r.ops)
        return ops + len(self.recomputations) * step.recomputation_seconds


def keep(step: StepGraph, region: Region) -> Effect:
    """Plain execution: autograd holds what it saved."""
    return Effect(saved_holds(step, region.saved))


def checkpoint(step: StepGraph, region: Region, rng_state_bytes: int) -> Effect:
    """The whole region recomputed; ``rng_state_bytes`` is the size of a saved generator state."""
    frame_end = max(step.saved[i].released for i in region.saved)
    holds = dict.fromkeys(step.calls[region.call].inputs, frame_end)
    for storage, until in saved_holds(step, region.saved).items():
        if step.storages[storage].born < region.start:
            holds[storage] = max(holds.get(storage, 0), until)
    ops = range(region.start, step.saved[region.saved[-1]].packed)
    copies = _copies(step, region, ops)
    if rng_state_bytes:
        copies += (Copy(-1, rng_state_bytes, 0, len(ops), 0),)
    return Effect(
        holds,
        ((rng_state_bytes, region.start, frame_end),) if rng_state_bytes else (),
        (Recomputation(region.backward_start, ops, copies),),
    )


def saved_holds(step: StepGraph, saved: range | tuple[int, ...]) -> dict[int, int]:
    """Storages that saved tensors keep alive, with the clock until which they do."""
    holds: dict[int, int] = {}
    for index in saved:
        tensor = step.saved[index]
        holds[tensor.storage] = max(holds.get(tensor.storage, 0), tensor.until)
    return holds


def _copies(step: StepGraph, region: Region, ops: range) -> tuple[Copy, ...]:
    uses: dict[int, int] = {}
    for saved in (step.saved[i] for i in region.saved):
        # Asking for a recomputed tensor takes it out of the frame; one never asked for stays there.
        until = saved.released if saved.unpacked is None else saved.used_until
        if until > region.backward_start:
            uses[saved.storage] = max(uses.get(saved.storage, 0), until)
    copies = []
    born = {s for i in ops for s in step.ops[i].outputs if step.storages[s].born == i}
    for index in sorted(born):
        storage = step.storages[index]
        copies.append(
            Copy(
                index,
                storage.size_bytes,
                storage.born - ops.start,
                min(storage.released, ops.stop) - ops.start,
                uses.get(index, 0),
            )
        )
    return tuple(copies)
