"""Straight-line functions that recompute parts of a recorded forward.

``compile_schedule`` writes one for a storage and what else is there: the instructions that the
program names, each variable deleted after the op that reads it last, so that storages live exactly
as long as the planner's simulator says. What a function reads from outside, it asks its ``Reader``
for. Depends on the records of a forward.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memfit.integrations.recording import Recorded, Root, Value, generator


class Reader(Protocol):
    """A call of the region, as a schedule sees it. Arguments of a recomputation come in boxes."""

    def parameter(self, index: int) -> torch.Tensor:
        """A parameter or buffer, by its place."""

    def alive(self, storage: int) -> torch.Tensor:
        """The base of a storage that an earlier recomputation left."""

    def put(self, dropped: Any, tensor: torch.Tensor) -> None:
        """Leaves the base of a recomputed storage for autograd."""


Schedule = Callable[[Reader, tuple[Any, ...]], torch.Tensor | None]
"""Leaves what it makes with its reader, or returns what it was asked for."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Slot of a kept storage, held as what the region's forward packs first of it."""

    storage: int


@dataclass(frozen=True, slots=True)
class Argument:
    """Slot of a tensor in the region's arguments."""

    index: int


@dataclass(frozen=True, slots=True)
class State:
    """Slot of a generator's state, taken at a pack; at -1 before the first."""

    pack: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class Sample:
    """Slot of what a dropped storage was in the forward, in a few elements."""

    storage: int


Slot = Kept | Argument | State | Sample


def values_in(item: Any) -> Iterator[Value]:
    """The tensors in the arguments of a step."""
    if isinstance(item, Value):
        yield item
    elif isinstance(item, (tuple, list)):
        for inner in item:
            yield from values_in(inner)
    elif isinstance(item, dict):
        for inner in item.values():
            yield from values_in(inner)


def root_of(recorded: Recorded, value: Value) -> Root:
    """The tensor from outside to read a value through: itself, or one that begins before it."""
    roots = recorded.roots[value.storage]
    exact = (r for r in roots if r.value == value)
    start = value.offset * value.dtype.itemsize

    def distance(root: Root) -> int:
        return start - root.value.offset * root.value.dtype.itemsize

    before = [r for r in roots if distance(r) >= 0]
    return next(exact, None) or min(before, key=distance, default=roots[0])


def view_as(tensor: torch.Tensor, of: Value, value: Value) -> torch.Tensor:
    """``value`` in the storage of ``tensor``, which is ``of`` there, perhaps at another place."""
    moved = tensor.storage_offset() * of.dtype.itemsize - of.offset * of.dtype.itemsize
    offset = value.offset + moved // value.dtype.itemsize
    if value.dtype == tensor.dtype:
        return tensor.as_strided(value.shape, value.stride, offset)
    return in_storage(tensor.untyped_storage(), tensor.device, value, offset)


def in_storage(
    storage: torch.UntypedStorage, device: torch.device, value: Value, offset: int
) -> torch.Tensor:
    """A tensor like ``value`` on a storage."""
    empty = torch.empty(0, dtype=value.dtype, device=device)
    return empty.set_(storage, offset, value.shape, value.stride)


def compile_schedule(
    recorded: Recorded,
    storage: int,
    present: frozenset[int],
    slots: tuple[Slot, ...],
    first: dict[int, Value],
    dropped: Mapping[int, Any],
) -> Schedule:
    """The function that recomputes ``storage`` when the storages ``present`` are there.

    ``slots`` say what the boxes that it is given hold, ``first`` as what kept storages are held,
    and ``dropped`` which storages autograd may ask for, with what the reader calls them. Without
    any, the function returns the base of the storage.
    """
    return _Writer(recorded, storage, present, slots, first, dropped).compile()


class _Writer:
    """Writes one function."""

    def __init__(
        self,
        recorded: Recorded,
        storage: int,
        present: frozenset[int],
        slots: tuple[Slot, ...],
        first: dict[int, Value],
        dropped: Mapping[int, Any],
    ) -> None:
        self._recorded = recorded
        self._present = present
        self._slots = {slot: position for position, slot in enumerate(slots)}
        self._first = first
        self._dropped = dropped
        self._result = "" if dropped else f"s{storage}"
        program = recorded.program
        self._closure = program.closure(storage, present)
        self._written = {s for i in self._closure for s in program.instructions[i].writes}
        self._names: dict[str, Any] = {"view_as": view_as, "swap": _swap, "restore": _restore}
        self._lines = ["def recompute(call, boxes):"]
        self._used: dict[int, dict[str, str]] = {}
        self._last: dict[str, int] = {}
        for index in self._closure:
            step = recorded.steps[index]
            self._used[index] = {
                self._variable(v): self._source(v) for v in values_in((step.args, step.kwargs))
            }
            self._last.update(dict.fromkeys(self._used[index], index))

    def compile(self) -> Schedule:
        """The function."""
        loaded: set[str] = set()
        # Arguments first: the region before may have to make them.
        sources = {v: s for used in self._used.values() for v, s in used.items() if v[0] == "a"}
        for variable, source in sources.items():
            self._write(f"{variable} = {source}")
            loaded.add(variable)
        for index in self._closure:
            for variable, source in self._used[index].items():
                if source and variable not in loaded:
                    self._write(f"{variable} = {source}")
                    loaded.add(variable)
            self._run(index)
        if self._result:
            self._write(f"return {self._result}")
        exec(_code("\n".join(self._lines)), self._names)
        schedule: Schedule = self._names["recompute"]
        # The namespace would hold the function that holds it.
        del self._names["recompute"]
        return schedule

    def _write(self, line: str) -> None:
        self._lines.append(f"    {line}")

    def _run(self, index: int) -> None:
        step, instruction = self._recorded.steps[index], self._recorded.program.instructions[index]
        variables = dict.fromkeys(self._used[index])
        results = []
        for storage, path in step.made:
            name = f"s{storage}"
            wanted = name in self._last or name == self._result or self._ends(storage)
            if wanted and self._is_fresh(storage):
                results.append((name, path))
        variables.update(dict.fromkeys(name for name, _ in results))
        if instruction.random:
            slot = State(self._recorded.program.captured_at[index], step.device)
            device = self._constant(step.device)
            self._write(f"state = swap({device}, boxes[{self._slots[slot]}])")
            self._write("try:")
            self._call(index, results, "    ")
            self._write("finally:")
            self._write(f"    restore({device}, state)")
            self._write("del state")
        else:
            self._call(index, results)
        for storage in dict.fromkeys((*instruction.allocates, *instruction.writes)):
            if self._makers(storage)[-1:] == (index,) and self._ends(storage):
                name = self._constant(self._dropped[storage])
                self._write(f"call.put({name}, s{storage})")
        variables.pop(self._result, None)
        if done := [v for v in variables if self._last.get(v, index) <= index]:
            self._write(f"del {', '.join(done)}")

    def _call(self, index: int, results: list[tuple[str, str]], indent: str = "") -> None:
        step = self._recorded.steps[index]
        # The bound operator itself spares a call in Python per op.
        self._names[f"op{index}"] = getattr(step.func, "_op", step.func)
        arguments = [self._expression(a) for a in step.args]
        arguments += [f"{name}={self._expression(a)}" for name, a in step.kwargs.items()]
        call = f"op{index}({', '.join(arguments)})"
        if not results:
            self._write(indent + call)
        elif len(results) == 1:
            self._write(f"{indent}{results[0][0]} = {call}{results[0][1]}")
        else:
            self._write(f"{indent}out = {call}")
            for name, path in results:
                self._write(f"{indent}{name} = out{path}")
            self._write(f"{indent}del out")

    # -- storages and values ---------------------------------------------------------------------

    def _makers(self, storage: int) -> tuple[int, ...]:
        return self._recorded.program.makers.get(storage, ())

    def _is_fresh(self, storage: int) -> bool:
        """Whether the storage is made here. What is present is read as it is, unless it would be
        written to."""
        makers = self._makers(storage)
        return bool(makers) and (storage not in self._present or storage in self._written)

    def _ends(self, storage: int) -> bool:
        """Whether the storage is made here to its end, and autograd may ask for it."""
        complete = all(i in self._used for i in self._makers(storage))
        return storage in self._dropped and self._is_fresh(storage) and complete

    def _variable(self, value: Value) -> str:
        if value.storage in self._recorded.bases:
            return f"s{value.storage}"
        root = root_of(self._recorded, value)
        return f"{'a' if root.is_argument else 'p'}{root.index}"

    def _source(self, value: Value) -> str:
        """Where a variable comes from; empty for what is made here."""
        storage = value.storage
        if self._is_fresh(storage):
            return ""
        if storage in self._recorded.bases:
            slot = self._slots.get(Kept(storage))
            return f"call.alive({storage})" if slot is None else f"boxes[{slot}].take()"
        root = root_of(self._recorded, value)
        if root.is_argument:
            return f"boxes[{self._slots[Argument(root.index)]}].take()"
        return f"call.parameter({root.index})"

    def _expression(self, item: Any) -> str:
        if isinstance(item, Value):
            return self._view(item)
        if isinstance(item, (tuple, list)):
            inner = "".join(f"{self._expression(i)}, " for i in item)
            return f"[{inner}]" if isinstance(item, list) else f"({inner})"
        plain = item is None or type(item) in (int, bool)
        if plain or (type(item) is float and math.isfinite(item)):
            return repr(item)
        return self._constant(item)

    def _view(self, value: Value) -> str:
        name = self._variable(value)
        is_outside = value.storage not in self._recorded.bases
        if is_outside:
            base = root_of(self._recorded, value).value
        elif not self._is_fresh(value.storage) and Kept(value.storage) in self._slots:
            base = self._first[value.storage]
        else:
            base = self._recorded.bases[value.storage]
        if value == base:
            return name
        if value.dtype != base.dtype:
            return f"view_as({name}, {self._constant(base)}, {self._constant(value)})"
        # Strides and offset of what the program makes are those of the recording.
        offset = str(value.offset)
        if is_outside:
            offset = f"{name}.storage_offset() + {value.offset - base.offset}"
        return f"{name}.as_strided({value.shape}, {value.stride}, {offset})"

    def _constant(self, item: Any) -> str:
        for name, known in self._names.items():
            if known is item:
                return name
        name = f"c{len(self._names)}"
        self._names[name] = item
        return name


@functools.lru_cache(maxsize=4096)
def _code(source: str) -> Any:
    # Layers of a kind share their code.
    return compile(source, "<memfit schedule>", "exec")


def _swap(device: torch.device, state: Any) -> torch.Tensor:
    own = generator(device)
    before = own.get_state()
    own.set_state(state.tensor)
    return before


def _restore(device: torch.device, state: torch.Tensor) -> None:
    generator(device).set_state(state)
