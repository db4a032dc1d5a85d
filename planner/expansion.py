"""Fills in the calls of repeated layers that were not run, with the records of the one that was.

Ops, storages, saved tensors and calls come out as if every layer had been recorded, in the same
order; their fx nodes are those of the one. What only the whole step shows is checked here: a layer
that touches what its kin would not touch, or leaves more behind than its result, cannot stand for
others. Depends on the records of the step and of its repeats.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate

from torch import fx

from memfit.planner.recorder import Value
from memfit.planner.repeats import Layer, NotRepeatable
from memfit.planner.step_graph import Call, Op, Saved, StepGraph, Storage


def expand(
    step: StepGraph, pairs: Sequence[tuple[Layer, Layer]], forward_end: int = -1
) -> StepGraph:
    """``step`` with the second layer of each pair filled in like the first.

    At the clock ``forward_end`` the forward is over, and what autocast cached is released. Raises
    :class:`NotRepeatable`.
    """
    if not pairs:
        return step
    distinct = {id(pattern): pattern for pattern, _ in pairs}
    patterns = {key: _Pattern.of(step, pattern) for key, pattern in distinct.items()}
    repeats = [_Repeat.of(patterns[id(pattern)], layer) for pattern, layer in pairs]
    for repeat in repeats:
        repeat.check(step)
    return _Expansion(step, repeats, forward_end).result()


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The records of a layer that was run."""

    layer: Layer
    forward: range
    backward: range
    """Its ops."""
    saved: range
    calls: range
    """Those of the modules in it."""
    made: tuple[Value | None, ...]
    """Its result, the gradient that it returns, and those of its tensors."""
    given: tuple[Value, ...]
    """What comes from outside: its argument and the gradient of its result."""
    born_forward: tuple[int, ...]
    born_backward: tuple[int, ...]
    shared: frozenset[int]
    """Storages from outside that are the same for every layer."""

    @classmethod
    def of(cls, step: StepGraph, layer: Layer) -> "_Pattern":
        end, begin, stop = layer.end, layer.backward_begin, layer.backward_end
        if not (end and begin and stop and layer.made and layer.returned and layer.incoming):
            raise NotRepeatable(f"no gradient passes through {layer.module}")
        forward, backward = range(layer.begin.ops, end.ops), range(begin.ops, stop.ops)
        born = [s.born for s in step.storages]
        result = cls(
            layer,
            forward,
            backward,
            range(layer.begin.saved, end.saved),
            range(layer.begin.calls, end.calls),
            (layer.made, layer.returned, *layer.gradients),
            (layer.given, layer.incoming),
            tuple(s for s, at in enumerate(born) if at in forward),
            tuple(s for s, at in enumerate(born) if at in backward),
            frozenset(step.calls[layer.call].inputs)
            | {i for i, s in enumerate(step.storages) if s.kind.resident},
        )
        result._check(step)
        return result

    def _check(self, step: StepGraph) -> None:
        made = [value.storage for value in self.made if value is not None]
        if made[0] not in self.born_forward or not set(made[1:]) <= set(self.born_backward):
            raise NotRepeatable(f"{self.layer.module} returns what it was given")
        if len(set(made)) < len(made):
            raise NotRepeatable(f"gradients of {self.layer.module} share memory")


@dataclass(frozen=True, slots=True)
class _Repeat:
    """A layer to fill in, and what stands in for the values of its pattern."""

    pattern: _Pattern
    layer: Layer
    made: dict[int, int]
    """Storages of the pattern and the stand-ins for them."""
    given: dict[int, int]
    """The same of what comes from outside."""

    @classmethod
    def of(cls, pattern: _Pattern, layer: Layer) -> "_Repeat":
        if not (layer.made and layer.returned and layer.incoming):
            raise NotRepeatable(f"no gradient passes through {layer.module}")
        made = list(_matched(pattern.made, (layer.made, layer.returned, *layer.gradients), layer))
        given = list(_matched(pattern.given, (layer.given, layer.incoming), layer))
        ours = (*pattern.layer.residents, *pattern.layer.kept_gradients)
        theirs = (*layer.residents, *layer.kept_gradients)
        residents = zip(ours, theirs, strict=True)
        return cls(
            pattern,
            layer,
            {a.storage: b.storage for a, b in made},
            {**dict(residents), **{a.storage: b.storage for a, b in given}},
        )

    def check(self, step: StepGraph) -> None:
        """The engine adds another gradient of the argument before the layer's own are all there."""
        following, returned = self.backward_mark + 1, self.layer.returned
        assert returned
        if following == len(step.ops) or returned.storage not in step.ops[following].inputs:
            return
        others = set(step.ops[following].inputs) - {returned.storage}
        is_sum = step.ops[following].name == "aten.add.Tensor"
        if is_sum and any(0 <= step.storages[s].born < self.backward_mark for s in others):
            raise NotRepeatable(f"what {self.layer.module} is given is also used elsewhere")

    @property
    def forward_mark(self) -> int:
        """Op that stands for the forward."""
        return self.layer.begin.ops

    @property
    def backward_mark(self) -> int:
        assert self.layer.backward_begin
        return self.layer.backward_begin.ops


def _matched(
    pattern: Sequence[Value | None], own: Sequence[Value | None], layer: Layer
) -> Iterator[tuple[Value, Value]]:
    for a, b in zip(pattern, own, strict=True):
        if (a is None) != (b is None) or (a and b and a.layout != b.layout):
            raise NotRepeatable(f"{layer.module} makes other tensors than its kin")
        if a and b:
            yield a, b


class _Expansion:
    """Renumbers everything, stand-ins filled in. Clocks and indices of the given step are *old*."""

    def __init__(self, step: StepGraph, repeats: Sequence[_Repeat], forward_end: int) -> None:
        self._step = step
        self._forward_end = forward_end
        self._repeats = repeats
        self._marks = {r.forward_mark: (r, r.pattern.forward) for r in repeats}
        self._marks |= {r.backward_mark: (r, r.pattern.backward) for r in repeats}
        self._clock = [0]
        for op in range(len(step.ops)):
            mark = self._marks.get(op)
            self._clock.append(self._clock[-1] + (len(mark[1]) if mark else 1))
        self._number: dict[int, int] = {}
        self._filled: dict[tuple[int, int], int] = {}
        """New numbers of the storages of each repeat, by its forward mark and the pattern's."""

    def result(self) -> StepGraph:
        storages = self._storages()
        return replace(
            self._step,
            nodes=self._nodes(),
            ops=tuple(self._ops()),
            storages=tuple(storages),
            saved=self._saved(),
            calls=tuple(self._calls()),
        )

    def _shift(self, repeat: _Repeat, clock: int) -> int:
        """A clock of the pattern, moved to the repeat."""
        pattern = repeat.pattern
        if pattern.forward.start <= clock <= pattern.forward.stop:
            return self._clock[repeat.forward_mark] + clock - pattern.forward.start
        if pattern.backward.start <= clock <= pattern.backward.stop:
            return self._clock[repeat.backward_mark] + clock - pattern.backward.start
        if clock == self._forward_end:
            return self._clock[clock]
        raise NotRepeatable(f"{pattern.layer.module} leaves more behind than its result")

    # -- storages --------------------------------------------------------------------------------

    def _storages(self) -> list[Storage]:
        """All of them, and the numbers that they get; a repeat's are where its stand-ins were."""
        new: list[Storage] = []
        stand_ins = {s: r for r in self._repeats for s in r.made.values()}
        for old, storage in enumerate(self._step.storages):
            repeat = stand_ins.get(old)
            if repeat is None:
                self._number[old] = len(new)
                new.append(self._moved(old, self._clock[storage.born] if storage.born >= 0 else -1))
            elif old not in self._number:
                forward = storage.born == repeat.forward_mark
                pattern = repeat.pattern
                self._fill(repeat, pattern.born_forward if forward else pattern.born_backward, new)
        return new

    def _fill(self, repeat: _Repeat, born: Sequence[int], new: list[Storage]) -> None:
        for number in born:
            storage, own = self._step.storages[number], repeat.made.get(number)
            at = self._shift(repeat, storage.born)
            self._filled[repeat.forward_mark, number] = len(new)
            if own is not None:
                made = self._step.storages[own]
                if made.size_bytes != storage.size_bytes:
                    raise NotRepeatable(f"{repeat.layer.module} returns a part of something larger")
                self._number[own] = len(new)
                # The shape is the pattern's: what a stand-in makes may be a view of such a tensor.
                released, kind, name = self._released(own), made.kind, made.name
                new.append(replace(storage, born=at, released=released, kind=kind, name=name))
            else:
                released = self._shift(repeat, storage.released)
                new.append(storage.at(at, released))

    def _moved(self, old: int, born: int) -> Storage:
        return self._step.storages[old].at(born, self._released(old))

    def _released(self, old: int) -> int:
        """A stand-in releases what it was given at its end, the layer perhaps within.

        A gradient that becomes a sum, and so is gone when that begins, stays beside it as a view.
        """
        clock = self._step.storages[old].released
        mark = self._marks.get(clock - 1)
        if mark is not None:
            repeat, ops = mark
            for given, own in repeat.given.items():
                released = self._step.storages[given].released
                if own == old and ops.start < released <= ops.stop:
                    incoming = repeat.layer.incoming
                    assert incoming
                    summed = given in self._step.ops[released].inputs
                    late = summed and incoming.is_view and incoming.storage == own
                    return self._shift(repeat, released + late)
        return self._clock[clock]

    def _storage(self, repeat: _Repeat, number: int) -> int:
        """New number of what the pattern's storage is to the repeat."""
        found = self._filled.get((repeat.forward_mark, number))
        if found is not None:
            return found
        if number in repeat.given:
            return self._number[repeat.given[number]]
        if number not in repeat.pattern.shared:
            raise NotRepeatable(f"{repeat.pattern.layer.module} uses what it was not given")
        return self._number[number]

    # -- ops -------------------------------------------------------------------------------------

    def _ops(self) -> Iterator[Op]:
        call_numbers = self._call_numbers
        for index, op in enumerate(self._step.ops):
            mark = self._marks.get(index)
            if mark is None:
                yield self._renumbered(op, self._number.__getitem__, call_numbers.get(op.call, -1))
                continue
            repeat, ops = mark
            for copied in ops:
                own = self._step.ops[copied]
                call = self._call_of(repeat, own.call) if own.call >= 0 else -1
                yield self._renumbered(own, partial(self._storage, repeat), call)

    def _nodes(self) -> dict[int, fx.Node]:
        nodes: dict[int, fx.Node] = {}
        for index, node in self._step.nodes.items():
            mark = self._marks.get(index)
            own = [node] if mark is None else [self._step.nodes[op] for op in mark[1]]
            nodes |= enumerate(own, self._clock[index])
        return nodes

    def _renumbered(self, op: Op, number: Callable[[int], int], call: int) -> Op:
        inputs, outputs, written = (
            tuple(map(number, storages)) for storages in (op.inputs, op.outputs, op.written)
        )
        return Op(
            op.name, op.phase, call, op.signature, inputs, outputs, written,
            op.random, op.dtype, op.flops, op.moved_bytes,
        )  # fmt: skip

    # -- calls and saved tensors -----------------------------------------------------------------

    @cached_property
    def _inside(self) -> dict[int, _Repeat]:
        return {r.layer.call: r for r in self._repeats}

    @cached_property
    def _call_numbers(self) -> dict[int, int]:
        numbers, count = {}, 0
        for old in range(len(self._step.calls)):
            numbers[old] = count
            repeat = self._inside.get(old)
            count += 1 + (len(repeat.pattern.calls) if repeat else 0)
        return numbers

    def _call_of(self, repeat: _Repeat, old: int) -> int:
        """New number of what the pattern's call is to the repeat."""
        if old == repeat.pattern.layer.call:
            return self._call_numbers[repeat.layer.call]
        return self._call_numbers[repeat.layer.call] + 1 + old - repeat.pattern.calls.start

    def _calls(self) -> Iterator[Call]:
        for old, call in enumerate(self._step.calls):
            first = self._saved_before(call.saved.start, call.start)
            yield replace(
                call,
                parent=self._call_numbers.get(call.parent, -1),
                start=self._clock[call.start],
                stop=self._clock[call.stop],
                saved=range(first, self._saved_before(call.saved.stop, call.stop)),
                inputs=tuple(self._number[s] for s in call.inputs),
            )
            if (repeat := self._inside.get(old)) is not None:
                yield from self._calls_in(repeat, first)

    def _calls_in(self, repeat: _Repeat, first_saved: int) -> Iterator[Call]:
        pattern, module = repeat.pattern, repeat.layer.module
        moved = first_saved - pattern.saved.start
        for old in pattern.calls:
            call = self._step.calls[old]
            yield replace(
                call,
                module=module + call.module.removeprefix(pattern.layer.module),
                parent=self._call_of(repeat, call.parent),
                start=self._shift(repeat, call.start),
                stop=self._shift(repeat, call.stop),
                saved=range(call.saved.start + moved, call.saved.stop + moved),
                inputs=tuple(self._storage(repeat, s) for s in call.inputs),
            )

    @cached_property
    def _fills(self) -> list[tuple[int, int, _Repeat]]:
        """Where saved tensors are filled in: before which old one, and at which forward mark."""
        return sorted(
            ((r.layer.begin.saved, r.forward_mark, r) for r in self._repeats), key=lambda f: f[:2]
        )

    @cached_property
    def _fill_counts(self) -> list[int]:
        return list(accumulate((len(r.pattern.saved) for *_, r in self._fills), initial=0))

    def _saved_before(self, old: int, clock: int) -> int:
        """New index of the saved tensor ``old``, or of the first that is filled in there."""
        at = bisect_left(self._fills, (old, clock), key=lambda f: f[:2])
        return old + self._fill_counts[at]

    def _saved(self) -> tuple[Saved, ...]:
        """In the order of saving, and numbered in the order in which the backward asks for them."""
        fills = deque(self._fills)
        asked: list[tuple[int, int, int]] = []
        found: list[Saved] = []
        for old, saved in enumerate((*self._step.saved, None)):
            while fills and fills[0][0] == old:
                repeat = fills.popleft()[2]
                found += self._saved_in(repeat)
                asked += self._asked_in(repeat)
            if saved is not None:
                found.append(self._moved_save(saved))
                asked.append((saved.order, len(self._step.ops), 0))
        used = (i for i, saved in enumerate(found) if saved.unpacked is not None)
        orders = {i: order for order, i in enumerate(sorted(used, key=asked.__getitem__))}
        return tuple(replace(s, order=orders.get(i, 0)) for i, s in enumerate(found))

    def _asked_in(self, repeat: _Repeat) -> Iterator[tuple[int, int, int]]:
        """Sort before what was asked for when the stand-in had run, and among each other by it."""
        assert repeat.layer.backward_begin
        asked = repeat.layer.backward_begin.asked
        for old in repeat.pattern.saved:
            yield asked, repeat.backward_mark, self._step.saved[old].order

    def _moved_save(self, saved: Saved) -> Saved:
        unpacked = None if saved.unpacked is None else self._clock[saved.unpacked]
        return replace(
            saved,
            storage=self._number[saved.storage],
            packed=self._clock[saved.packed],
            released=self._clock[saved.released],
            unpacked=unpacked,
            used_until=self._clock[saved.used_until],
        )

    def _saved_in(self, repeat: _Repeat) -> Iterator[Saved]:
        for old in repeat.pattern.saved:
            saved = self._step.saved[old]
            shift = partial(self._shift, repeat)
            unpacked, until = saved.unpacked, saved.used_until
            yield replace(
                saved,
                storage=self._storage(repeat, saved.storage),
                packed=shift(saved.packed),
                released=shift(saved.released),
                unpacked=None if unpacked is None else shift(unpacked),
                used_until=until if unpacked is None else shift(until),
            )
