"""A region's forward as a program that can be run again in parts.

The one place that says what a selective region recomputes, from what and in which order: the
options of the solver, the simulator and the executor all ask it. It counts in storages, not in
tensors: views are free, and keeping one view of a storage keeps them all. Depends on the standard
library only.

A storage that is recomputed runs every instruction that makes it, in the order of the forward, from
what is there: storages that the plan keeps, arguments and parameters, and storages that an earlier
recomputation left for autograd to ask for.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

# Attention kernels by another name on every device.
_ATTENTION = "scaled_dot_product"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One op of the forward. Ops that only make views are instructions too, without effect."""

    module: str
    """Innermost module that runs it, relative to the region; empty for the region itself."""
    op: str
    """Name of the aten op, such as ``aten.addmm.default``."""
    reads: tuple[int, ...]
    allocates: tuple[int, ...]
    writes: tuple[int, ...] = ()
    """Storages that it changes in place."""
    random: bool = False
    once: bool = False
    """Whether running it again might not repeat it."""
    blank: bool = False
    """Whether what it allocates holds nothing until another instruction writes to it."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A tensor that autograd saves."""

    storage: int
    position: int
    """How many instructions have run."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What a recomputation may need, whatever else is there."""

    storages: frozenset[int]
    """Kept storages and inputs."""
    random: frozenset[int]
    """Random instructions, which need the state of the generator before them."""


class Program:
    """The instructions of one forward of a region.

    ``inputs`` are the storages from outside that can be read again in the backward: arguments,
    parameters and buffers. Other storages from outside cannot.
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        packs: Sequence[Pack],
        inputs: Collection[int],
    ) -> None:
        self.instructions = tuple(instructions)
        self.packs = tuple(packs)
        self.inputs = frozenset(inputs)
        self.makers = _makers(self.instructions)
        self.droppable = tuple(
            dict.fromkeys(p.storage for p in self.packs if p.storage in self.makers)
        )
        """Saved storages that the program makes, in the order in which they are saved."""
        self.names = _names(self.instructions, self.makers)
        """Readable names of all storages that the program makes."""
        self.captured_at = _captures(self.instructions, self.packs)
        """For random instructions: the last pack before, when the generator's state is taken.

        -1 stands for the region's entry. An instruction that another random one keeps from being
        reached that way is missing: its results cannot be recomputed.
        """
        self._fixed = _once(self.instructions, self.captured_at) | {
            index
            for index, instruction in enumerate(self.instructions)
            if any(s not in self.makers and s not in self.inputs for s in instruction.reads)
        }
        """Instructions that cannot run again, or read what cannot be read again."""
        self._bits: dict[frozenset[int], int] = {}
        self._reach: dict[int, int] = {}
        self._sources: dict[tuple[int, int], Sources] = {}
        self._closures: dict[tuple[int, int], tuple[int, ...]] = {}
        self._reads: dict[tuple[int, int], int] = {}

    @property
    def key(self) -> object:
        """Equal for equal programs."""
        return self.instructions, self.packs, self.inputs

    def kept(self, wanted: Collection[int]) -> frozenset[int]:
        """Saved storages that stay when ``wanted`` shall: these, and what cannot be recomputed."""
        kept = frozenset(s for s in self.droppable if s in wanted)
        for storage in self.droppable:
            if storage not in kept and not self.can_remake(storage, kept):
                kept |= {storage}
        return kept

    def can_remake(self, storage: int, kept: frozenset[int]) -> bool:
        """Whether a storage can be recomputed when those of ``kept`` are there."""
        return storage in self.makers and self._fixed.isdisjoint(self.closure(storage, kept))

    def closure(self, storage: int, present: frozenset[int]) -> tuple[int, ...]:
        """Instructions that make ``storage`` again when the storages ``present`` are there."""
        key = self._key(storage, present)
        if key not in self._closures:
            self._closures[key] = self._find_closure(storage, present)
        return self._closures[key]

    def _key(self, storage: int, present: frozenset[int]) -> tuple[int, int]:
        """Equal where what is present makes no difference to making the storage again.

        Sets are integers here, of a bit for each storage: many are asked for.
        """
        if present not in self._bits:
            self._bits[present] = _as_bits(present)
        if storage not in self._reach:
            chosen = [self.instructions[i] for i in self._find_closure(storage, frozenset())]
            touched = {s for i in chosen for s in (*i.reads, *i.writes)}
            self._reach[storage] = _as_bits(touched | {storage})
        return storage, self._bits[present] & self._reach[storage]

    def _find_closure(self, storage: int, present: frozenset[int]) -> tuple[int, ...]:
        needed: set[int] = set()
        seen = {storage}
        stack = [storage]
        while stack:
            for index in self.makers.get(stack.pop(), ()):
                if index in needed:
                    continue
                needed.add(index)
                instruction = self.instructions[index]
                # What is changed in place is made anew, so that what is present stays as it is.
                fresh = [s for s in instruction.writes if s not in seen]
                fresh += [s for s in instruction.reads if s not in present and s not in seen]
                seen.update(fresh)
                stack += fresh
        return tuple(sorted(needed))

    def sources(self, storage: int, kept: frozenset[int]) -> Sources:
        """What a dropped ``storage`` holds on to until autograd releases it."""
        key = self._key(storage, kept)
        if key not in self._sources:
            self._sources[key] = self._find_sources(storage, kept)
        return self._sources[key]

    def _find_sources(self, storage: int, kept: frozenset[int]) -> Sources:
        needed = self.closure(storage, kept)
        made = {
            s
            for i in needed
            for s in (*self.instructions[i].allocates, *self.instructions[i].writes)
        }
        read = {s for i in needed for s in self.instructions[i].reads}
        return Sources(
            # A kept storage may be made anew beside one that is needed, and is read as it is then.
            frozenset(s for s in read if s in kept or s not in made),
            frozenset(i for i in needed if self.instructions[i].random),
        )

    def probes(self, kept: frozenset[int]) -> tuple[int, ...]:
        """Dropped storages that no other dropped one is made from.

        If these come out as they were, so did all.
        """
        dropped = [s for s in self.droppable if s not in kept]
        inside = 0
        for storage in dropped:
            if not inside >> storage & 1:
                inside |= self._made_from(storage, kept)
        return tuple(s for s in dropped if not inside >> s & 1)

    def _made_from(self, storage: int, kept: frozenset[int]) -> int:
        key = self._key(storage, kept)
        if key not in self._reads:
            chosen = [self.instructions[i] for i in self.closure(storage, kept)]
            self._reads[key] = _as_bits({s for i in chosen for s in i.reads if s != storage})
        return self._reads[key]


def _as_bits(storages: Iterable[int]) -> int:
    bits = 0
    for storage in storages:
        bits |= 1 << storage
    return bits


def short_name(op: str) -> str:
    """``aten.addmm.default`` as people say it: ``addmm``."""
    name = op.split(".")[1] if "." in op else op
    return "sdpa" if _ATTENTION in name else name.strip("_")


def _makers(instructions: Sequence[Instruction]) -> dict[int, tuple[int, ...]]:
    """The instructions that allocate a storage or change it, for those that the program makes."""
    makers: dict[int, tuple[int, ...]] = {}
    for index, instruction in enumerate(instructions):
        for storage in instruction.allocates:
            makers[storage] = (index,)
        for storage in instruction.writes:
            if storage in makers and index not in makers[storage]:
                makers[storage] += (index,)
    return makers


def _names(
    instructions: Sequence[Instruction], makers: dict[int, tuple[int, ...]]
) -> dict[int, str]:
    """``self_attn.q_proj.addmm``; the second of a kind ends in ``#2``, a second result in ``[1]``.

    A storage that is changed in place is called after the random op that fills it, or the last.
    """
    times: Counter[str] = Counter()
    labels = []
    for instruction in instructions:
        label = ".".join(filter(None, (instruction.module, short_name(instruction.op))))
        times[label] += 1
        labels.append(label if times[label] == 1 else f"{label}#{times[label]}")
    names = {}
    for storage, made_by in makers.items():
        random = [i for i in made_by if instructions[i].random]
        index = random[-1] if random else made_by[-1]
        results = instructions[index].allocates
        position = results.index(storage) if storage in results else 0
        names[storage] = labels[index] + (f"[{position}]" if position else "")
    return names


def _captures(instructions: Sequence[Instruction], packs: Sequence[Pack]) -> dict[int, int]:
    captures: dict[int, int] = {}
    last_random = 0
    pack = -1
    for index, instruction in enumerate(instructions):
        while pack + 1 < len(packs) and packs[pack + 1].position <= index:
            pack += 1
        if not instruction.random:
            continue
        since = packs[pack].position if pack >= 0 else 0
        if last_random <= since:
            captures[index] = pack
        last_random = index + 1
    return captures


def _once(instructions: Sequence[Instruction], captured_at: dict[int, int]) -> frozenset[int]:
    """Instructions that cannot run again, or that read what is overwritten later."""
    last_write: dict[int, int] = {}
    for index, instruction in enumerate(instructions):
        last_write.update(dict.fromkeys(instruction.writes, index))

    def reads_old(index: int, reads: Iterable[int], writes: Collection[int]) -> bool:
        return any(last_write.get(s, -1) > index and s not in writes for s in reads)

    def stays_blank(i: Instruction) -> bool:
        # Something that is no op fills it.
        return i.blank and not all(s in last_write for s in i.allocates)

    return frozenset(
        index
        for index, i in enumerate(instructions)
        if i.once
        or (i.random and index not in captured_at)
        or reads_old(index, i.reads, i.writes)
        or stays_blank(i)
    )
