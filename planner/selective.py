"""What the action ``selective`` does to the step: keeps named tensors, recomputes others on demand.

The executor drops what is not kept when the region's forward returns. When the backward first asks
for a dropped tensor, the instructions that make it run again from what is there, and leave what
else they made for autograd to ask for. Which instructions, and from what, is decided by
:mod:`memfit.planner.program`; this file adds when, and for how long. Depends on the step's records.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

from torch import fx

from memfit.planner.op_facts import is_dynamic, makes_blank, runs_once
from memfit.planner.program import Instruction, Pack, Program
from memfit.planner.recompute import Copy, Effect, Recomputation
from memfit.planner.regions import Region
from memfit.planner.step_graph import Kind, Saved, StepGraph

_READABLE = (Kind.PARAMETER, Kind.BUFFER)
# Place of a tensor that the backward never asks for.
_NEVER = (1 << 62, 0)


@dataclass(frozen=True, slots=True)
class RegionProgram:
    """A region's program; its storages are numbered from 0 and stand for those of the step."""

    program: Program
    storages: tuple[int, ...]

    def names(self, storages: Collection[int]) -> tuple[str, ...]:
        """Names of some storages of the program, in the order in which they are saved."""
        return tuple(self.program.names[s] for s in self.program.droppable if s in storages)


def region_program(
    step: StepGraph, region: Region, nodes: dict[int, fx.Node]
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


def selective(
    step: StepGraph,
    region: Region,
    compiled: RegionProgram,
    kept: frozenset[int],
    rng_state_bytes: int,
) -> Effect:
    """The region when it keeps the storages ``kept`` of its program.

    ``rng_state_bytes`` is the size of a saved generator state.
    """
    return _Selective(step, region, compiled, kept, rng_state_bytes).effect()


class _Selective:
    """Follows a region through forward and backward."""

    def __init__(
        self,
        step: StepGraph,
        region: Region,
        compiled: RegionProgram,
        kept: frozenset[int],
        rng_state_bytes: int,
    ) -> None:
        self._step = step
        self._region = region
        self._program = compiled.program
        self._storages = compiled.storages
        self._kept = kept
        self._rng_state_bytes = rng_state_bytes
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
                _extend(holds, saved.storage, saved.until)
                continue
            _extend(holds, saved.storage, self._region.stop)
            sources = self._program.sources(pack.storage, self._kept)
            for storage in sources.storages:
                _extend(holds, self._storages[storage], saved.released)
            for instruction in sources.random:
                _extend(states, self._program.captured_at[instruction], saved.released)
        return Effect(holds, (*self._states(states), *self._samples()), self._recomputations())

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
            (saved[0].sample_bytes, saved[0].packed, max(s.released for s in saved))
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
