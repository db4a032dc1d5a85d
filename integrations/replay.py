"""Runs a region with some of what autograd saves dropped, and recomputed when it is asked for.

A forward that was recorded once runs under saved tensor hooks alone: each saved tensor is compared
with the recording, then kept or replaced by a :class:`Handle`. When the backward asks a handle, it
runs a schedule, which leaves what else it made in other handles. Handles hold what they need to be
recomputed, nothing holds them but autograd, and nothing here refers to itself, so that memory is
free as soon as autograd lets go. Depends on the records of a forward and on schedules.
"""

import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from memfit.integrations.boxes import Box, Late, Packed, Version, boxed, modified
from memfit.integrations.links import Link, Passed, Relay, Source
from memfit.integrations.probes import Probe, Verdict
from memfit.integrations.recording import Recorded, Value, generator
from memfit.integrations.schedules import (
    Argument,
    Kept,
    Sample,
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
from memfit.planner.shadows import tensors_in

_AS_IS = nullcontext()
_KEEP, _KEEP_DETACHED, _KEEP_LEAF, _KEEP_IN_SLOT, _DROP, _PASS = range(6)
# What is expected after the last tensor.
_NOTHING = (None, None, None, None)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A storage that autograd asks to be saved and that is recomputed instead."""

    storage: int
    base: Value
    """What is recomputed."""
    probe: Probe | None
    handles: tuple[tuple[int, Value | None], ...]
    """Which of the handles of a call are in it: for the base, or for a view of it."""


class Replay:
    """What to do with each tensor that a recorded forward saves, for a set of kept storages.

    ``linked`` are the arguments that the region before makes again. A region that is ``followed``
    by one with such arguments can make its results again.
    """

    def __init__(
        self,
        recorded: Recorded,
        kept: frozenset[int],
        region: str,
        linked: Collection[int] = (),
        followed: bool = False,
    ) -> None:
        program = recorded.program
        self.recorded = recorded
        self.slots: list[Slot] = []
        self.parameters: set[int] = set()
        self._kept = kept
        self._first: dict[int, Value] = {}
        for value in recorded.packed:
            self._first.setdefault(value.storage, value)
        self._probed = program.probes(kept)
        self._held = {s: self._hold(s) for s in program.droppable if s not in kept}
        self.results = self._find_results() if followed else {}
        """Slots from which a storage that the forward returns is made again."""
        self._passed = {
            storage: root
            for storage, roots in recorded.roots.items()
            for root in roots
            if root.is_argument and root.index in linked
        }
        self._sets = list(dict.fromkeys(self._held.values()))
        self.pick = [_picker(slots) for slots in self._sets]
        """What takes the boxes that dropped storages hold on to out of all, set by set."""
        self.dropped = self._find_dropped(region)
        self.expected = self._expectations()
        arguments = [(i, s.index) for i, s in enumerate(self.slots) if isinstance(s, Argument)]
        self.arguments = [(i, index) for i, index in arguments if index not in linked]
        """Slots to be filled with arguments,"""
        self.linked = [(i, index) for i, index in arguments if index in linked]
        """and those with what makes them again."""
        self.first_states = self.states_at(-1)
        self._schedules: dict[tuple[int, frozenset[int], bool], Schedule] = {}

    def schedule(self, storage: int, alive: Collection[int], as_result: bool = False) -> Schedule:
        """Recomputes a storage while others are there beside those that are kept."""
        key = storage, frozenset(alive), as_result
        schedule = self._schedules.get(key)
        if schedule is None:
            held, dropped = (self.results, {}) if as_result else (self._held, self.dropped)
            slots = tuple(self.slots[i] for i in held[storage])
            schedule = self._schedules[key] = compile_schedule(
                self.recorded, storage, self._kept | key[1], slots, self._first, dropped
            )
        return schedule

    def _find_results(self) -> dict[int, tuple[int, ...]]:
        program = self.recorded.program
        return {
            value.storage: self._hold(value.storage, is_result=True)
            for value in self.recorded.results
            if value.storage not in self._kept and program.can_remake(value.storage, self._kept)
        }

    def states_at(self, pack: int) -> tuple[int, ...]:
        """Slots of the generator states to be taken at a pack."""
        return tuple(i for i, s in enumerate(self.slots) if isinstance(s, State) and s.pack == pack)

    def _hold(self, storage: int, is_result: bool = False) -> tuple[int, ...]:
        program = self.recorded.program
        slots: dict[Slot, None] = {}
        for index in program.closure(storage, self._kept):
            step, instruction = self.recorded.steps[index], program.instructions[index]
            for value in values_in((step.args, step.kwargs)):
                if value.storage in self._kept and value.storage not in instruction.writes:
                    slots[Kept(value.storage)] = None
                elif value.storage in self.recorded.roots:
                    root = root_of(self.recorded, value)
                    if root.is_argument:
                        slots[Argument(root.index)] = None
                    else:
                        self.parameters.add(root.index)
            if instruction.random:
                slots[State(program.captured_at[index], step.device)] = None
        if storage in self._probed and not is_result:
            slots[Sample(storage)] = None  # the last
        return tuple(self._slot(slot) for slot in slots)

    def _slot(self, slot: Slot) -> int:
        if slot not in self.slots:
            self.slots.append(slot)
        return self.slots.index(slot)

    def _find_dropped(self, region: str) -> dict[int, Dropped]:
        recorded = self.recorded
        drops = [value for value in recorded.packed if value.storage in self._held]
        found = {}
        for storage in self._held:
            base, first = recorded.bases[storage], self._first[storage]
            name = f"{recorded.program.names[storage]} of {region}"
            probe = Probe(first, base, name) if storage in self._probed else None
            handles = [(i, v) for i, v in enumerate(drops) if v.storage == storage]
            views = tuple((i, None if value == base else value) for i, value in handles)
            found[storage] = Dropped(storage, base, probe, views)
        return found

    def _expectations(self) -> tuple[Any, ...]:
        seen: set[int] = set()
        expected = []
        for index, value in enumerate(self.recorded.packed):
            is_first = value.storage not in seen
            seen.add(value.storage)
            shape, stride = torch.Size(value.shape), value.stride
            what, *details = self._decide(index, is_first)
            extra = self._extra(index, is_first)
            rule = (what, *details, extra) if what != _KEEP or extra else None
            expected.append((shape, stride, value.dtype, rule))
        return tuple(expected)

    def _decide(self, index: int, is_first: bool) -> tuple[int, int, Any]:
        """What to do with a packed tensor, with which slot or set of slots, and which storage is
        dropped, or of which argument it is a view."""
        value = self.recorded.packed[index]
        storage = value.storage
        if storage in self._held:
            return _DROP, self._sets.index(self._held[storage]), storage
        if storage in self._passed:
            root = self._passed[storage]
            return _PASS, self._slot(Argument(root.index)), (root.value, value)
        if is_first and Kept(storage) in self.slots:
            return _KEEP_IN_SLOT, self.slots.index(Kept(storage)), None
        if any(r.is_leaf and r.value == value for r in self.recorded.roots.get(storage, ())):
            return _KEEP_LEAF, 0, None
        return _KEEP_DETACHED if index in self.recorded.tied else _KEEP, 0, None

    def _extra(self, index: int, is_first: bool) -> tuple[Any, ...] | None:
        """Slots of generator states to fill at a pack, and that of a sample with its probe."""
        storage = self.recorded.packed[index].storage
        states = self.states_at(index)
        if is_first and storage in self._probed:
            return states, (self.slots.index(Sample(storage)), self.dropped[storage].probe)
        return (states, None) if states else None


class Opened:
    """A call of the region whose forward runs.

    Everything is held until it has returned, and all that it saved was as recorded.
    """

    __slots__ = (
        "_boxes", "_call", "_entry", "_expected", "_handles", "_held", "_matches", "_passed",
        "_replay",
    )  # fmt: skip

    def __init__(
        self, replay: Replay, entry: Entry, verdict: Verdict, links: Mapping[int, Link]
    ) -> None:
        self._replay = replay
        self._entry = entry
        self._call = Call(replay, entry.places, verdict)
        self._boxes: list[Any] = [Box() for _ in replay.slots]
        for position, index in replay.linked:
            self._boxes[position] = links[index]
        self._held = [pick(self._boxes) for pick in replay.pick]
        self._handles: list[Handle] = []
        self._passed: list[Passed] = []
        self._expected = iter(replay.expected)
        self._matches = True
        self._capture(replay.first_states)

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | Packed":
        """Saved tensor hook; runs for every saved tensor, so that speed matters."""
        shape, stride, dtype, rule = next(self._expected, _NOTHING)
        # Devices follow from those of the arguments.
        if shape != tensor.shape or dtype is not tensor.dtype or stride != tensor.stride():
            self._matches = False
            self._expected = iter(())
            return boxed(tensor)
        if rule is None:
            return boxed(tensor) if tensor._version else tensor
        what, number, of, extra = rule
        if extra is not None:
            self._take_extra(tensor, *extra)
        if what == _DROP:
            handle = Handle(self._call, of, self._held[number], tensor)
            self._handles.append(handle)
            return handle
        if what == _KEEP_IN_SLOT:
            box: Box = self._boxes[number]
            box.fill(tensor)
            return box
        if what == _PASS:
            passed = Passed(tensor, self._boxes[number], *of)
            self._passed.append(passed)
            return passed
        if what == _KEEP_LEAF or tensor._version:
            return boxed(tensor)
        return tensor.detach() if what == _KEEP_DETACHED else tensor

    def _take_extra(
        self, tensor: torch.Tensor, states: tuple[int, ...], sample: tuple[int, Probe] | None
    ) -> None:
        self._capture(states)
        if sample is not None:
            index, probe = sample
            self._boxes[index].tensor = probe.sample(tensor)

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
            if isinstance(packed := self.pack(box.tensor), (Handle, Passed)):
                late.target = packed
        captured_at = self._replay.recorded.program.captured_at
        by_pack = {captured_at[i]: state for i, state in states.items() if i in captured_at}
        for slot, box in zip(self._replay.slots, self._boxes, strict=True):
            if isinstance(slot, State):
                box.tensor = torch.frombuffer(bytearray(by_pack[slot.pack]), dtype=torch.uint8)

    def commit(self, out: Any = None, relay: Relay | None = None) -> bool:
        """The forward has returned: drops what is not kept; False if it keeps all after all.

        How to make ``out`` again is left in the ``relay``, for the region that follows.
        """
        if not self._matches or next(self._expected, None) is not None:
            self.release()
            return False
        for position, index in self._replay.arguments:
            self._boxes[position].fill(self._entry.arguments[index].detach())
        call = self._call
        places = call.places
        for index in self._replay.parameters:
            held, name = places[index]
            call.versions[index] = Version(held[name])
        for passed in self._passed:
            passed.drop()
        self._passed = []
        for handle in self._handles:
            handle.held = None
        call.handles = list(map(weakref.ref, self._handles))
        call.is_open = False
        self._handles = []
        if relay is not None:
            self._leave(out, relay)
        self.release()
        return True

    def _leave(self, out: Any, relay: Relay) -> None:
        recorded, results = self._replay.recorded, self._replay.results
        for tensor, value in zip(tensors_in(out), recorded.results, strict=False):
            slots = results.get(value.storage)
            if slots is not None and tensor.shape == value.shape and tensor.dtype == value.dtype:
                name, base = recorded.program.names[value.storage], recorded.bases[value.storage]
                boxes = tuple([self._boxes[i] for i in slots])
                relay.leave(tensor, Source(name, self._call, base, boxes, tensor._version))

    def release(self) -> None:
        """Lets go of the call; what was not committed is kept."""
        kept: tuple[Handle | Passed, ...] = (*self._handles, *self._passed)
        for packed in kept:
            packed.keep()
        # autograd keeps the hook, and with it this object, for as long as what it saved.
        self._handles, self._passed, self._held, self._boxes = [], [], [], []
        self._entry.arguments.clear()


class Call:
    """A call of the region whose backward is to come."""

    __slots__ = ("_alive", "_replay", "handles", "is_open", "places", "verdict", "versions")

    def __init__(self, replay: Replay, places: list[Place], verdict: Verdict) -> None:
        self._replay = replay
        self.places = places
        self.verdict = verdict
        self.is_open = True
        self.handles: list[weakref.ref[Handle]] = []
        self.versions: dict[int, Version] = {}
        # Storages that were recomputed, for as long as anything uses them.
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def recompute(self, storage: int, boxes: tuple[Box, ...]) -> None:
        """Leaves the storage, and what is made on the way to it, in the handles."""
        self._alive = alive = {s: ref for s, ref in self._alive.items() if ref() is not None}
        with _as_recorded():
            if storage in alive:
                self.put(self._replay.dropped[storage], self.alive(storage))
            else:
                self._replay.schedule(storage, alive)(self, boxes)

    def remake(self, storage: int, boxes: tuple[Packed, ...]) -> torch.Tensor:
        """The base of a storage that the forward returned."""
        self._alive = alive = {s: ref for s, ref in self._alive.items() if ref() is not None}
        with _as_recorded():
            if storage in alive:
                return self.alive(storage)
            made = self._replay.schedule(storage, alive, as_result=True)(self, boxes)
        assert made is not None
        return made

    def put(self, dropped: Dropped, tensor: torch.Tensor) -> None:
        """Leaves a recomputed storage in its handles."""
        storage, probe = dropped.storage, dropped.probe
        is_new = True
        for number, view in dropped.handles:
            handle = self.handles[number]()
            if handle is None:
                continue
            if is_new:
                is_new = False
                self._alive[storage] = weakref.ref(tensor.untyped_storage())
                if probe is not None:
                    probe.compare(tensor, handle.boxes[-1].tensor, self)
            if handle.held is None and not handle.given:
                handle.held = tensor if view is None else view_as(tensor, dropped.base, view)

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


def _picker(slots: tuple[int, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Takes the boxes of these slots out of all."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda boxes: tuple([boxes[i] for i in slots])


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


class Handle:
    """Stands for a saved tensor that is dropped. Each is handed over once, then made anew."""

    __slots__ = (
        "__weakref__", "_call", "_storage", "_version", "boxes", "given", "held",
    )  # fmt: skip

    def __init__(
        self, call: Call, storage: int, boxes: tuple[Box, ...], tensor: torch.Tensor
    ) -> None:
        self._call: Call | None = call
        self.boxes = boxes
        self._version = tensor._version
        self._storage = storage
        self.held: torch.Tensor | None = tensor
        self.given = False

    def keep(self) -> None:
        """Becomes as good as a box."""
        assert self.held is not None
        self.held = self.held.detach()
        self.boxes = ()
        self._call = None

    def take(self) -> torch.Tensor:
        """The tensor, for the backward."""
        call = self._call
        if call is None or call.is_open:
            return self._take_held()
        if self.held is None:
            self.given = False
            call.recompute(self._storage, self.boxes)
        tensor = self.held
        assert tensor is not None
        self.held = None
        self.given = True
        return tensor

    def _take_held(self) -> torch.Tensor:
        assert self.held is not None
        if self.held._version != self._version:
            raise modified(self.held, self._version)
        return self.held.detach()
