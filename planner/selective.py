"""What the action ``selective`` does to the step: keeps named tensors, recomputes others on demand.

The executor drops what is not kept when the region's forward returns. When the backward first asks
for a dropped tensor, the instructions that make it run again from what is there, and leave what
else they made for autograd to ask for. Which instructions, and from what, is decided by
:mod:`memfit.planner.program`; this file adds when, and for how long. Depends on the step's records.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import fx

from memfit.planner.op_facts import is_dynamic, makes_blank, runs_once
from memfit.planner.program import Instruction, Pack, Program
from memfit.planner.recompute import Chain, Copy, Effect, Recomputation
from memfit.planner.regions import Region
from memfit.planner.step_graph import Kind, Saved, StepGraph

_READABLE = (Kind.PARAMETER, Kind.BUFFER)
# Place of a tensor that the backward never asks for.
_NEVER = (1 << 62, 0)


@dataclass(frozen=True, slots=True)
class Links:
    """Storages of the step that pass from a region to the next and that are not held."""

    inputs: frozenset[int]
    """Made again by the region before."""
    outputs: frozenset[int]
    """Made again for the region after."""


@dataclass(frozen=True, slots=True)
class RegionProgram:
    """A region's program; its storages are numbered from 0 and stand for those of the step."""

    program: Program
    storages: tuple[int, ...]

    def names(self, storages: Collection[int]) -> tuple[str, ...]:
        """Names of some storages of the program, in the order in which they are saved."""
        return tuple(self.program.names[s] for s in self.program.droppable if s in storages)

    def output_names(self, storages: Collection[int]) -> tuple[str, ...]:
        """Names of storages of the step that it makes."""
        return tuple(self.program.names[s] for s in sorted(self.local(storages)))

    def local(self, storages: Collection[int]) -> frozenset[int]:
        """The numbers that storages of the step have here."""
        return frozenset(n for n, s in enumerate(self.storages) if s in storages)


def region_program(
    step: StepGraph, region: Region, nodes: Mapping[int, fx.Node]
) -> RegionProgram | None:
    """The program of a region; None when what it runs depends on values."""
    numbers: dict[int, int] = {}

    def local(storages: Collection[int]) -> tuple[int, ...]:
        return tuple(numbers.setdefault(s, len(numbers)) for s in storages)

    instructions = []
    for index in range(region.start, region.stop):
        op, node = step.ops[index], nodes[index]
        if is_dynamic(node.target, node.args):
            return None
        made = [s for s in dict.fromkeys(op.outputs) if step.storages[s].born == index]
        module = step.calls[op.call].module.removeprefix(region.name).removeprefix(".")
        instructions.append(
            Instruction(
                module,
                op.name,
                () if makes_blank(node.target) else local(op.inputs),
                local(made),
                local(dict.fromkeys(op.written)),
                op.random,
                runs_once(node.target),
                makes_blank(node.target),
            )
        )
    packs = [
        Pack(local([step.saved[i].storage])[0], step.saved[i].packed - region.start)
        for i in region.saved
    ]
    arguments = step.calls[region.call].inputs
    inputs = {n for s, n in numbers.items() if s in arguments or step.storages[s].kind in _READABLE}
    return RegionProgram(Program(instructions, packs, inputs), tuple(numbers))


def region_programs(step: StepGraph, regions: Sequence[Region]) -> list[RegionProgram | None]:
    """The programs of the regions that may recompute.

    Equal ones are one object: what is worked out for it serves all regions that run it.
    """
    nodes = step.nodes
    known: dict[object, Program] = {}
    programs: list[RegionProgram | None] = []
    for region in regions:
        found = None if region.kept_because else region_program(step, region, nodes)
        if found is not None:
            found = replace(found, program=known.setdefault(found.program.key, found.program))
        programs.append(found)
    return programs


def selective(
    step: StepGraph,
    region: Region,
    compiled: RegionProgram,
    kept: frozenset[int],
    rng_state_bytes: int,
    links: Links | None = None,
) -> Effect:
    """The region when it keeps the storages ``kept`` of its program.

    ``rng_state_bytes`` is the size of a saved generator state; ``links`` are those of a region in a
    segment.
    """
    return _Selective(step, region, compiled, kept, rng_state_bytes, links).effect()


class _Selective:
    """Follows a region through forward and backward."""

    def __init__(
        self,
        step: StepGraph,
        region: Region,
        compiled: RegionProgram,
        kept: frozenset[int],
        rng_state_bytes: int,
        links: Links | None,
    ) -> None:
        self._step = step
        self._region = region
        self._program = compiled.program
        self._storages = compiled.storages
        self._kept = kept
        self._rng_state_bytes = rng_state_bytes
        self._links = links
        self._given: dict[int, int] = {}
        self._dropped: dict[int, list[Saved]] = {}
        for pack, index in zip(self._program.packs, region.saved, strict=True):
            if pack.storage in self._program.makers and pack.storage not in kept:
                self._dropped.setdefault(pack.storage, []).append(step.saved[index])

    def effect(self) -> Effect:
        holds: dict[int, int] = {}
        states: dict[int, int] = {}
        for pack, index in zip(self._program.packs, self._region.saved, strict=True):
            saved = self._step.saved[index]
            if pack.storage not in self._dropped:
                self._hold(holds, saved.storage, saved.until)
                continue
            _extend(holds, saved.storage, self._region.stop)
            self._hold_sources(holds, states, pack.storage, saved.released)
        for storage in self._outputs():
            # The regions after this one have their backward, and need it, before.
            self._hold_sources(holds, states, storage, self._region.backward_start)
        recomputations = self._recomputations()
        extra = (*self._states(states), *self._samples())
        return Effect(holds, extra, recomputations, self._chain(recomputations))

    def _hold(self, holds: dict[int, int], storage: int, until: int) -> None:
        if self._links and storage in self._links.inputs:
            _extend(self._given, storage, until)
            until = self._region.stop
        _extend(holds, storage, until)

    def _hold_sources(
        self, holds: dict[int, int], states: dict[int, int], storage: int, until: int
    ) -> None:
        """What a storage of the program is made from again, held until then."""
        sources = self._program.sources(storage, self._kept)
        for source in sources.storages:
            self._hold(holds, self._storages[source], until)
        for instruction in sources.random:
            _extend(states, self._program.captured_at[instruction], until)

    def _outputs(self) -> list[int]:
        if self._links is None:
            return []
        return [n for n, s in enumerate(self._storages) if s in self._links.outputs]

    def _chain(self, recomputations: Sequence[Recomputation]) -> Chain | None:
        if self._links is None:
            return None
        inputs = self._links.inputs
        needed = [
            r.at
            for r in recomputations
            if any(not inputs.isdisjoint(self._step.ops[i].inputs) for i in r.ops)
        ]
        for index in self._region.saved:
            saved = self._step.saved[index]
            if saved.storage in inputs and saved.unpacked is not None:
                needed.append(saved.unpacked)
        return Chain(inputs, self._given, min(needed, default=-1), self._rerun())

    def _rerun(self) -> Recomputation | None:
        closures = [self._program.closure(s, self._kept) for s in self._outputs()]
        if not closures:
            return None
        closure = tuple(sorted(set().union(*closures)))
        ops = tuple(self._region.start + i for i in closure)
        return Recomputation(self._region.backward_start, ops, self._copies(closure, {}))

    def _states(self, states: dict[int, int]) -> list[tuple[int, int, int]]:
        if not self._rng_state_bytes:
            return []
        packs = self._region.saved
        return [
            (
                self._rng_state_bytes,
                self._step.saved[packs[pack]].packed if pack >= 0 else self._region.start,
                until,
            )
            for pack, until in states.items()
        ]

    def _samples(self) -> list[tuple[int, int, int]]:
        probed = [self._dropped[s] for s in self._program.probes(self._kept)]
        return [
            (saved[0].sample_bytes, saved[0].packed - saved[0].own, max(s.released for s in saved))
            for saved in probed
        ]

    def _recomputations(self) -> tuple[Recomputation, ...]:
        asked = sorted(
            (saved.unpacked, saved.order, storage)
            for storage, all_saved in self._dropped.items()
            for saved in all_saved
            if saved.unpacked is not None
        )
        alive: dict[int, int] = {}
        recomputations = []
        for clock, order, storage in asked:
            if alive.get(storage, 0) > clock:
                continue
            present = self._kept.union(s for s, until in alive.items() if until > clock)
            closure = self._program.closure(storage, present)
            until = self._awaited(closure, (clock, order))
            alive.update(until)
            recomputations.append(
                Recomputation(
                    clock,
                    tuple(self._region.start + i for i in closure),
                    self._copies(closure, until),
                )
            )
        return tuple(recomputations)

    def _awaited(self, closure: tuple[int, ...], now: tuple[int, int]) -> dict[int, int]:
        """Dropped storages that the closure makes, with the clock until which they then live."""
        awaited: dict[int, int] = {}
        for storage in self._made(closure):
            for saved in self._dropped.get(storage, ()):
                asked = _NEVER if saved.unpacked is None else (saved.unpacked, saved.order)
                if asked >= now and saved.released > now[0]:
                    until = saved.released if saved.unpacked is None else saved.used_until
                    _extend(awaited, storage, until)
        return awaited

    def _made(self, closure: tuple[int, ...]) -> tuple[int, ...]:
        instructions = self._program.instructions
        return tuple(chain.from_iterable(instructions[i].allocates for i in closure))

    def _copies(self, closure: tuple[int, ...], awaited: dict[int, int]) -> tuple[Copy, ...]:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        copies = []
        for position, index in enumerate(closure):
            instruction = self._program.instructions[index]
            for storage in instruction.allocates:
                first[storage] = position
            for storage in (*instruction.allocates, *instruction.reads, *instruction.writes):
                last[storage] = position + 1
            if instruction.random and self._rng_state_bytes:
                # The generator's own state, while the recorded one is in its place.
                copies.append(Copy(-1, self._rng_state_bytes, position, position + 1, 0))
        for storage, position in first.items():
            index = self._storages[storage]
            size = self._step.storages[index].size_bytes
            copies.append(Copy(index, size, position, last[storage], awaited.get(storage, 0)))
        return tuple(copies)


def _extend(until: dict[int, int], key: int, clock: int) -> None:
    until[key] = max(until.get(key, 0), clock)
