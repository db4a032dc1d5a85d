"""Runs a region with some of what autograd saves dropped, and recomputed when it is asked for.

A forward that was recorded once runs under saved tensor hooks alone: each saved tensor is compared
with the recording, then kept or replaced by a :class:`Handle`. When the backward asks a handle, it
runs a schedule, which leaves what else it made in other handles. Handles hold what they need to be
recomputed, nothing holds them but autograd, and nothing here refers to itself, so that memory is
free as soon as autograd lets go. Depends on the records of a forward and on schedules.
"""

import weakref
from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from memfit.integrations.boxes import Box, Late, Version, boxed, modified
from memfit.integrations.probes import Probe, Verdict
from memfit.integrations.recording import Recorded, Value, generator
from memfit.integrations.schedules import (
    Argument,
    Kept,
    Schedule,
    Slot,
    State,
    compile_schedule,
    in_storage,
    root_of,
    values_in,
    view_as,
)
from memfit.integrations.signatures import Entry, Place, device_types

_AS_IS = nullcontext()
_KEEP, _KEEP_LEAF, _KEEP_IN_SLOT, _DROP = range(4)
# What is expected after the last tensor.
_NOTHING = (None, None, None, _KEEP, 0, None, None)


class Replay:
    """What to do with each tensor that a recorded forward saves, for a set of kept storages."""

    def __init__(self, recorded: Recorded, kept: frozenset[int], region: str) -> None:
        program = recorded.program
        self.recorded = recorded
        self.region = region
        self.dropped = tuple(s for s in program.droppable if s not in kept)
        self.first: dict[int, Value] = {}
        for value in recorded.packed:
            self.first.setdefault(value.storage, value)
        self.slots: list[Slot] = []
        self.held: dict[int, tuple[int, ...]] = {}
        """For each dropped storage, the slots that it holds."""
        self.parameters: set[int] = set()
        for storage in self.dropped:
            self.held[storage] = self._hold(storage, kept)
        self.expected = self._expectations(kept)
        self._kept = kept
        self._schedules: dict[tuple[int, frozenset[int]], Schedule] = {}

    def schedule(self, storage: int, alive: Collection[int]) -> Schedule:
        """Recomputes a storage while others are there beside those that are kept."""
        key = storage, frozenset(alive)
        schedule = self._schedules.get(key)
        if schedule is None:
            slots = tuple(self.slots[i] for i in self.held[storage])
            schedule = self._schedules[key] = compile_schedule(
                self.recorded, storage, self._kept | key[1], slots, self.first, self.held
            )
        return schedule

    def _hold(self, storage: int, kept: frozenset[int]) -> tuple[int, ...]:
        program = self.recorded.program
        closure = program.closure(storage, kept)
        slots: dict[Slot, None] = {}
        for index in closure:
            step, instruction = self.recorded.steps[index], program.instructions[index]
            for value in values_in((step.args, step.kwargs)):
                if value.storage in kept and value.storage not in instruction.writes:
                    slots[Kept(value.storage)] = None
                elif value.storage in self.recorded.roots:
                    root = root_of(self.recorded, value)
                    if root.is_argument:
                        slots[Argument(root.index)] = None
                    else:
                        self.parameters.add(root.index)
            if instruction.random:
                slots[State(program.captured_at[index], step.device)] = None
        return tuple(self._slot(slot) for slot in slots)

    def _slot(self, slot: Slot) -> int:
        if slot not in self.slots:
            self.slots.append(slot)
        return self.slots.index(slot)

    def _expectations(self, kept: frozenset[int]) -> tuple[Any, ...]:
        places = {storage: position for position, storage in enumerate(self.dropped)}
        probed = set(self.recorded.program.probes(kept))
        filled: set[int] = set()
        expected = []
        for index, value in enumerate(self.recorded.packed):
            storage = value.storage
            what, number = _KEEP, 0
            if any(r.is_leaf and r.value == value for r in self.recorded.roots.get(storage, ())):
                what = _KEEP_LEAF
            if storage in places:
                what, number = _DROP, places[storage]
            elif Kept(storage) in self.slots and storage not in filled:
                what, number = _KEEP_IN_SLOT, self.slots.index(Kept(storage))
            probe = None
            if storage in probed and storage not in filled:
                probe = Probe(value, self.region, self.recorded.program.names[storage])
            filled.add(storage)
            states = self.states_at(index)
            base = self.recorded.bases.get(storage)
            view = None if value == base else value
            extra = (states, probe) if states or probe else None
            shape, stride = torch.Size(value.shape), value.stride
            expected.append((shape, stride, value.dtype, what, number, view, extra))
        return tuple(expected)

    def states_at(self, pack: int) -> tuple[int, ...]:
        """Slots of the generator states to be taken at a pack."""
        return tuple(i for i, s in enumerate(self.slots) if isinstance(s, State) and s.pack == pack)


class Opened:
    """A call of the region whose forward runs.

    Everything is held until it has returned, and all that it saved was as recorded.
    """

    def __init__(self, replay: Replay, entry: Entry, verdict: Verdict) -> None:
        self._replay = replay
        self._entry = entry
        self._call = call = Call(replay, entry.places, verdict)
        self._boxes = boxes = tuple(Box() for _ in replay.slots)
        self._dropped = [
            Dropped(call, s, tuple([boxes[i] for i in replay.held[s]])) for s in replay.dropped
        ]
        call.dropped = {d.storage: weakref.ref(d) for d in self._dropped}
        self._handles: list[Handle] = []
        self._expected = iter(replay.expected)
        self._matches = True
        self._capture(replay.states_at(-1))

    def pack(self, tensor: torch.Tensor) -> "Box | Handle":
        """Saved tensor hook; runs for every saved tensor, so that speed matters."""
        shape, stride, dtype, what, number, view, extra = next(self._expected, _NOTHING)
        # Devices follow from those of the arguments.
        if shape != tensor.shape or dtype is not tensor.dtype or stride != tensor.stride():
            self._matches = False
            self._expected = iter(())
            return boxed(tensor)
        if extra is not None:
            self._take_extra(number, tensor, *extra)
        if what == _DROP:
            handle = Handle(self._dropped[number], view, tensor)
            self._handles.append(handle)
            return handle
        box = self._boxes[number] if what == _KEEP_IN_SLOT else Box()
        box.version = tensor._version
        # As in Box.fill; a leaf cannot refer to the node that saves it.
        box.tensor = tensor if what == _KEEP_LEAF else tensor.detach()
        return box

    def _take_extra(
        self, number: int, tensor: torch.Tensor, states: tuple[int, ...], probe: Probe | None
    ) -> None:
        self._capture(states)
        if probe is not None:
            self._dropped[number].probe = probe
            self._dropped[number].sample = probe.sample(tensor)

    def _capture(self, slots: tuple[int, ...]) -> None:
        for index in slots:
            slot = self._replay.slots[index]
            assert isinstance(slot, State)
            self._boxes[index].tensor = generator(slot.device).get_state()

    def pack_recorded(self, lates: list[Late], states: dict[int, bytes]) -> None:
        """Decides what becomes of the tensors that the recording forward saved."""
        for late in lates:
            box = late.target
            assert isinstance(box, Box)
            # Boxes stay: they know the version that the tensor had when it was saved.
            if isinstance(packed := self.pack(box.tensor), Handle):
                late.target = packed
        captured_at = self._replay.recorded.program.captured_at
        by_pack = {captured_at[i]: state for i, state in states.items() if i in captured_at}
        for slot, box in zip(self._replay.slots, self._boxes, strict=True):
            if isinstance(slot, State):
                box.tensor = torch.frombuffer(bytearray(by_pack[slot.pack]), dtype=torch.uint8)

    def commit(self) -> bool:
        """The forward has returned: drops what is not kept; False if it keeps all after all."""
        if not self._matches or next(self._expected, None) is not None:
            for handle in self._handles:
                handle.keep()
            self._handles.clear()
            return False
        for box, slot in zip(self._boxes, self._replay.slots, strict=True):
            if isinstance(slot, Argument):
                box.fill(self._entry.arguments[slot.index].detach())
        call = self._call
        for index in self._replay.parameters:
            held, name = call.places[index]
            call.versions[index] = Version(held[name])
        call.is_open = False
        for handle in self._handles:
            handle.held = None
        self._handles.clear()
        self.release()
        return True

    def release(self) -> None:
        """Lets go of the call; without ``commit`` the forward was left early, and all is kept."""
        for handle in self._handles:
            handle.keep()
        # autograd keeps the hook, and with it this object, for as long as what it saved.
        self._handles, self._dropped, self._boxes = [], [], ()
        self._entry.arguments.clear()


class Call:
    """A call of the region whose backward is to come."""

    __slots__ = ("_alive", "_replay", "dropped", "is_open", "places", "verdict", "versions")

    def __init__(self, replay: Replay, places: list[Place], verdict: Verdict) -> None:
        self._replay = replay
        self.places = places
        self.verdict = verdict
        self.is_open = True
        self.dropped: dict[int, weakref.ref[Dropped]] = {}
        self.versions: dict[int, Version] = {}
        # Storages that were recomputed, for as long as anything uses them.
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def recompute(self, dropped: "Dropped") -> None:
        """Leaves the storage, and what is made on the way to it, in the handles."""
        self._alive = {s: ref for s, ref in self._alive.items() if ref() is not None}
        storage = dropped.storage
        is_there = storage in self._alive
        schedule = None if is_there else self._replay.schedule(storage, self._alive)
        with _as_recorded():
            if schedule is None:
                self.put(storage, self.alive(storage))
            else:
                schedule(self, dropped.sources)

    def put(self, storage: int, tensor: torch.Tensor) -> None:
        """Leaves a recomputed storage in its handles."""
        dropped = self.dropped[storage]()
        if dropped is None:
            return
        base = self._replay.recorded.bases[storage]
        if dropped.probe is not None:
            dropped.probe.compare(view_as(tensor, base, dropped.probe.value), dropped.sample, self)
        self._alive[storage] = weakref.ref(tensor.untyped_storage())
        for reference in dropped.handles:
            handle = reference()
            if handle is not None and handle.held is None and not handle.given:
                view = handle.view
                handle.held = tensor if view is None else view_as(tensor, base, view)

    def alive(self, storage: int) -> torch.Tensor:
        """The base of a storage that is there."""
        found = self._alive[storage]()
        assert found is not None
        base = self._replay.recorded.bases[storage]
        return in_storage(found, found.device, base, base.offset)

    def parameter(self, index: int) -> torch.Tensor:
        """A parameter or buffer, as it was in the forward."""
        held, name = self.places[index]
        tensor: torch.Tensor = held[name]
        self.versions[index].check(tensor)
        return tensor


def _as_recorded() -> AbstractContextManager[Any]:
    """Ops run as recorded: below autograd and autocast, whose casts are ops of their own."""
    casting = [d for d in device_types() if torch.is_autocast_enabled(d)]
    if not casting and not torch.is_grad_enabled():
        return _AS_IS
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    for device in casting:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


class Dropped:
    """A storage that autograd asked to be saved and that is recomputed instead."""

    __slots__ = ("__weakref__", "call", "handles", "probe", "sample", "sources", "storage")

    def __init__(self, call: Call, storage: int, sources: tuple[Box, ...]) -> None:
        self.call = call
        self.storage = storage
        self.sources = sources
        self.handles: list[weakref.ref[Handle]] = []
        self.probe: Probe | None = None
        self.sample: torch.Tensor | None = None


class Handle:
    """Stands for a saved tensor that is dropped. Each is handed over once, then made anew."""

    __slots__ = ("__weakref__", "dropped", "given", "held", "version", "view")

    def __init__(self, dropped: Dropped, view: Value | None, tensor: torch.Tensor) -> None:
        self.dropped: Dropped | None = dropped
        self.view = view
        self.held: torch.Tensor | None = tensor
        self.version = tensor._version
        self.given = False
        dropped.handles.append(weakref.ref(self))

    def keep(self) -> None:
        """Becomes as good as a box."""
        assert self.held is not None
        self.held = self.held.detach()
        self.dropped = None

    def take(self) -> torch.Tensor:
        """The tensor, for the backward."""
        dropped = self.dropped
        if dropped is None or dropped.call.is_open:
            return self._take_held()
        if self.held is None:
            self.given = False
            dropped.call.recompute(dropped)
        tensor = self.held
        assert tensor is not None
        self.held = None
        self.given = True
        return tensor

    def _take_held(self) -> torch.Tensor:
        assert self.held is not None
        if self.held._version != self.version:
            raise modified(self.held, self.version)
        return self.held.detach()
