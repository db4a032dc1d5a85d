"""Records the aten ops of a step that runs on fake tensors: an fx.Graph and the life of every
storage.

Autograd's saved tensors are replaced by handles while they wait for the backward, so that two
causes of life can be told apart: references from Python and the engine, and what autograd saved.
That is what lets a plan be simulated that saves something else. Depends on torch and the step's
records.
"""

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memfit.planner._compat import (
    IN_PLACE_IN_BACKWARD,
    FakeTensorMode,
    TorchDispatchMode,
    device_asked,
    is_own_output,
    storage_key,
)
from memfit.planner.caching import is_cache
from memfit.planner.flops import flops_of
from memfit.planner.op_facts import signature, unreadable, work_dtype, written_tensors
from memfit.planner.shadows import Shadows, tensors_in
from memfit.planner.step_graph import (
    NUMBER_BYTES,
    SAMPLE_ELEMENTS,
    Call,
    Kind,
    Op,
    Phase,
    Saved,
    StepGraph,
    Storage,
)

_aten = torch.ops.aten
_SAVE_NUMBERS = frozenset(
    {_aten.mul.Tensor, _aten.div.Tensor, _aten.mul_.Tensor, _aten.div_.Tensor}
)
_PLAIN = (
    int,
    float,
    bool,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class _Handle:
    """Stands for a saved tensor in autograd's graph."""

    __slots__ = ("__weakref__", "device", "dtype", "index", "known", "node", "shape", "stride")

    def __init__(
        self, index: int, tensor: torch.Tensor, node: fx.Node, known: torch.Tensor | None
    ) -> None:
        self.index = index
        self.node = node
        self.known = known
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.dtype = tensor.dtype
        self.device = tensor.device


@dataclass(slots=True)
class _OpenStorage:
    size_bytes: int
    kind: Kind
    born: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    name: str = ""
    released: int | None = None


@dataclass(slots=True)
class _OpenSaved:
    storage: int
    packed: int
    released: int | None = None
    unpacked: int | None = None
    used_until: int = 0
    order: int = 0
    sample_bytes: int = 0
    own: bool = False
    watchers: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class _OpenCall:
    module: str
    type_name: str
    parent: int
    start: int
    first_saved: int
    inputs: tuple[int, ...]
    stop: int = 0
    last_saved: int = 0
    state: str = ""
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class Instant:
    """How many ops, saved tensors and calls were recorded, and how often autograd had asked."""

    ops: int
    saved: int
    calls: int
    asked: int


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the records."""

    storage: int
    layout: tuple[Any, ...]
    is_view: bool
    """Of what the op made that allocated the storage."""


def layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Shape, strides, offset and dtype."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def stands_in() -> None:
    """Target of the nodes whose ops are known from an equal layer."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that records a step; enter it inside the fake tensor mode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shadows = Shadows(mode, self.current_module)
        self.phase = Phase.FORWARD
        self.graph = fx.Graph()
        self._ops: list[Op] = []
        self._storages: list[_OpenStorage] = []
        self._saved: list[_OpenSaved] = []
        self._calls: list[_OpenCall] = []
        self._stack: list[int] = []
        self._live: dict[int, int] = {}
        self._watchers: dict[int, Any] = {}
        self._paused = False
        self._asked = 0
        self._numbers: list[int] = []
        self._in_use: set[int] = set()
        self._summands: list[tuple[int, int]] = []

    # -- tensors ---------------------------------------------------------------------------------

    def add_resident(self, tensor: torch.Tensor, kind: Kind, name: str) -> None:
        """Declares a tensor that is allocated before the step begins."""
        if storage_key(tensor) not in self._live:
            self._open_storage(tensor, kind, born=-1, name=name)

    def set_kind(self, tensor: torch.Tensor, kind: Kind, name: str) -> None:
        """Says what a tensor that the step allocated turned out to be."""
        storage = self._storages[self.storage_of(tensor)]
        storage.kind, storage.name = kind, name

    def is_resident(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is allocated before the step begins."""
        return self._storages[self.storage_of(tensor)].kind.resident

    def _open_storage(self, tensor: torch.Tensor, kind: Kind, born: int, name: str = "") -> int:
        key, index = storage_key(tensor), len(self._storages)
        storage = tensor.untyped_storage()
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self._storages.append(_OpenStorage(storage.nbytes(), kind, born, shape, dtype, name))
        self._live[key] = index
        self._watchers[index] = weakref.ref(storage, self._on_storage_death(key, index))
        return index

    def _on_storage_death(self, key: int, index: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            self._storages[index].released = len(self._ops)
            self._watchers.pop(index, None)
            self.shadows.forget_storage(key)
            if self._live.get(key) == index:
                del self._live[key]

        return died

    def storage_of(self, tensor: torch.Tensor) -> int:
        """Index of the tensor's storage."""
        index = self._live.get(storage_key(tensor))
        if index is None:  # a constant from outside of the model and the batch
            index = self._open_storage(tensor, Kind.CONSTANT, born=-1)
        return index

    # -- saved tensors ---------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> _Handle:
        """Saved-tensor hook: autograd keeps the handle, not the tensor."""
        index = len(self._saved)
        sample = min(SAMPLE_ELEMENTS, tensor.numel()) * tensor.element_size()
        node = self.node_of(tensor)
        own = node.target is not stands_in and is_own_output(tensor)
        saved = _OpenSaved(self.storage_of(tensor), len(self._ops), sample_bytes=sample, own=own)
        self._saved.append(saved)
        handle = _Handle(index, tensor, node, self.shadows.get(tensor))

        def dropped(_: Any) -> None:
            saved.released = len(self._ops)
            self._in_use.discard(index)

        saved.watchers.append(weakref.ref(handle, dropped))
        return handle

    def unpack(self, handle: _Handle) -> torch.Tensor:
        """Saved-tensor hook: a stand-in with its own storage, so that its use can be watched."""
        saved = self._saved[handle.index]
        if saved.unpacked is None:
            saved.unpacked, saved.order = len(self._ops), self._asked
            self._asked += 1
        saved.used_until = len(self._ops) + 1
        self._in_use.add(handle.index)
        self._paused = True
        try:
            tensor = torch.empty_strided(
                handle.shape, handle.stride, dtype=handle.dtype, device=handle.device
            )
        finally:
            self._paused = False
        tensor._memfit_node = handle.node  # type: ignore[attr-defined]
        tensor._memfit_shadow = handle.known  # type: ignore[attr-defined]
        self._watch_use(tensor, saved)
        return tensor

    def _watch_use(self, tensor: torch.Tensor, saved: _OpenSaved) -> None:
        key = storage_key(tensor)
        self._live[key] = saved.storage

        def done(_: Any) -> None:
            saved.used_until = len(self._ops)
            if self._live.get(key) == saved.storage:
                del self._live[key]

        saved.watchers.append(weakref.ref(tensor.untyped_storage(), done))

    # -- module calls ----------------------------------------------------------------------------

    def enter_call(
        self, module: str, type_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A module's forward begins."""
        parent = self.current_call()
        inputs = tuple(dict.fromkeys(self.storage_of(t) for t in tensors_in((args, kwargs))))
        call = _OpenCall(module, type_name, parent, len(self._ops), len(self._saved), inputs)
        if any(map(is_cache, (*args, *kwargs.values()))):
            call.state = "writes to a cache that it is given"
        call.unreadable = unreadable((args, kwargs))
        self._stack.append(len(self._calls))
        self._calls.append(call)

    def exit_call(self, attributes: Iterable[Any] = (), changed: str = "") -> None:
        """The innermost module's forward ends.

        ``attributes`` are what the module then holds, ``changed`` what it left behind, in words.
        """
        call = self._calls[self._stack.pop()]
        call.stop, call.last_saved = len(self._ops), len(self._saved)
        kept = (self._storages[self.storage_of(t)] for t in tensors_in(list(attributes)))
        if any(s.born >= call.start for s in kept):
            call.state = "keeps a tensor of its forward in itself"
        call.state = call.state or changed

    def current_call(self) -> int:
        """Index of the innermost module call; -1 outside of any."""
        return self._stack[-1] if self._stack else -1

    def current_module(self) -> str:
        """FQN of the module whose forward runs; empty for the model itself."""
        return self._calls[self._stack[-1]].module if self._stack else ""

    # -- repeated layers -------------------------------------------------------------------------

    def now(self) -> "Instant":
        """How much has been recorded."""
        return Instant(len(self._ops), len(self._saved), len(self._calls), self._asked)

    def value(self, tensor: torch.Tensor) -> "Value":
        """Where in the records a tensor is found."""
        storage, node = self.storage_of(tensor), self.node_of(tensor)
        is_view = node.meta.get("op") != self._storages[storage].born
        return Value(storage, layout_of(tensor), is_view)

    def stand_in(self, make: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
        """One op in place of many, which are known from an equal layer.

        ``make`` makes the tensors that later ops see of them.
        """
        index = len(self._ops)
        self._paused = True
        try:
            made = make()
        finally:
            self._paused = False
        for tensor in made:
            self._open_storage(tensor, Kind.ACTIVATION, index)
            node = self.graph.create_node("call_function", stands_in)
            node.meta["op"] = index
            self._describe(node, tensor)
        call = self.current_call()
        self._ops.append(
            Op(
                "stand-in", self.phase, call, "stand-in", (), (), (),
                random=False, dtype="", flops=0, moved_bytes=0,
            )
        )  # fmt: skip
        return made

    # -- ops -------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if (device := device_asked(func, args)) is not None:
            return device
        kwargs = kwargs or {}
        if self._paused or func.namespace in ("prim", "profiler"):
            return func(*args, **kwargs)
        if func is _aten.detach.default:
            return self._detach(func, args)
        if func in IN_PLACE_IN_BACKWARD and self._just_made_by_backward(args[0]):
            func = IN_PLACE_IN_BACKWARD[func]
        out = self.shadows.run(func, args, kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _just_made_by_backward(self, tensor: torch.Tensor) -> bool:
        born = self._storages[self.storage_of(tensor)].born
        return self.phase is Phase.BACKWARD and born == len(self._ops) - 1

    def _detach(self, func: Any, args: tuple[Any, ...]) -> Any:
        out = func(*args)
        for name in ("_memfit_node", "_memfit_shadow"):
            if (value := getattr(args[0], name, None)) is not None:
                setattr(out, name, value)
        return out

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        index = len(self._ops)
        arguments, results = list(tensors_in((args, kwargs))), list(tensors_in(out))
        inputs = tuple(dict.fromkeys(self.storage_of(t) for t in arguments))
        node = self._node(func, args, kwargs)
        node.meta["op"] = index
        outputs = tuple(self._bind(t, index) for t in results)
        self._name_results(node, out)
        if func in _SAVE_NUMBERS and torch.is_grad_enabled():
            self._hold_numbers(args, index)
        elif self.phase is Phase.BACKWARD and func is _aten.add.Tensor:
            self._add_gradients(arguments[0], index)
        if self._stack and any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
            self._calls[self._stack[-1]].state = "draws from a generator of its own"
        written = written_tensors(func, args, kwargs)
        self._ops.append(
            Op(
                name=str(func),
                phase=self.phase,
                call=self.current_call(),
                signature=signature(func, args, kwargs),
                inputs=inputs,
                outputs=outputs,
                written=tuple(self.storage_of(t) for t in written),
                random=torch.Tag.nondeterministic_seeded in func.tags,
                dtype=work_dtype((*results, *arguments)),
                flops=flops_of(func, args, kwargs, out),
                moved_bytes=0
                if set(outputs) <= set(inputs) and not written
                else sum(t.numel() * t.element_size() for t in (*arguments, *results)),
            )
        )

    def _add_gradients(self, waiting: torch.Tensor, index: int) -> None:
        """The engine adds a gradient in place to the one that waits for it, when that is no view.

        It never does so for fake tensors (``can_accumulate_inplace`` in torch's input_buffer.cpp).
        A sum that a node makes itself is told apart by the saved tensors that the node still uses.
        """
        if self._in_use:
            return
        value = self.value(waiting)
        size = waiting.numel() * waiting.element_size()
        if not value.is_view and self._storages[value.storage].size_bytes == size:
            self._summands.append((value.storage, index))

    def _hold_numbers(self, args: tuple[Any, ...], index: int) -> None:
        """A Python number as a factor: autograd saves it as a tensor that no hook sees."""
        factors = [a for a in args if type(a) in (int, float)]
        if factors and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            self._numbers.append(len(self._storages))
            self._storages.append(_OpenStorage(NUMBER_BYTES, Kind.NUMBER, index))

    def _bind(self, tensor: torch.Tensor, born: int) -> int:
        index = self._live.get(storage_key(tensor))
        return self._open_storage(tensor, Kind.ACTIVATION, born) if index is None else index

    def _node(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        return self.graph.create_node(
            "call_function", func, self._fx(args), self._fx(kwargs) if kwargs else {}
        )

    def _fx(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(self._fx(v) for v in value)
        if isinstance(value, dict):
            return {key: self._fx(v) for key, v in value.items()}
        return repr(value)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The fx node whose result the tensor is."""
        node: fx.Node | None = getattr(tensor, "_memfit_node", None)
        if node is None or node.graph is not self.graph:
            storage = self.storage_of(tensor)
            node = self.graph.placeholder(f"{self._storages[storage].kind.name.lower()}_{storage}")
            self._describe(node, tensor)
        return node

    def _describe(self, node: fx.Node, tensor: torch.Tensor) -> None:
        node.meta.update(shape=tuple(tensor.shape), stride=tensor.stride(), dtype=tensor.dtype)
        tensor._memfit_node = node  # type: ignore[attr-defined]

    def _name_results(self, node: fx.Node, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            self._describe(node, out)
        elif isinstance(out, (tuple, list)):
            for position, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    part = self.graph.create_node(
                        "call_function", operator.getitem, (node, position)
                    )
                    part.meta.update(node.meta)
                    self._describe(part, item)

    # -- result ----------------------------------------------------------------------------------

    def finish(self, notes: tuple[str, ...] = ()) -> StepGraph:
        """The records of everything that ran. Tensors that are still alive live to the end."""
        end = len(self._ops)
        self._settle_numbers()
        released = [end if s.released is None else s.released for s in self._storages]
        self._settle_sums(released)
        storages = [
            Storage(s.size_bytes, s.kind, s.born, until, s.shape, s.dtype, s.name)
            for s, until in zip(self._storages, released, strict=True)
        ]
        saved = [
            Saved(s.storage, s.packed, end if s.released is None else s.released, s.unpacked,
                  s.used_until, s.order, s.sample_bytes, s.own)
            for s in self._saved
        ]  # fmt: skip
        calls = [
            Call(c.module, c.type_name, c.parent, c.start, c.stop,
                 range(c.first_saved, c.last_saved), c.inputs, c.state, c.unreadable)
            for c in self._calls
        ]  # fmt: skip
        nodes: dict[int, fx.Node] = {}
        for node in self.graph.nodes:
            if "op" in node.meta:
                nodes.setdefault(node.meta["op"], node)
        return StepGraph(
            nodes, tuple(self._ops), tuple(storages), tuple(saved), tuple(calls), notes
        )

    def _settle_numbers(self) -> None:
        """A saved number is released with what its module saved."""
        for index in self._numbers:
            number = self._storages[index]
            call = self._calls[self._ops[number.born].call]
            released = [s.released for s in self._saved[call.first_saved : call.last_saved]]
            number.released = max((r for r in released if r is not None), default=None)

    def _settle_sums(self, released: list[int]) -> None:
        """A summand that nothing else keeps becomes the sum: it is not alive beside it."""
        saved = {s.storage for s in self._saved}
        for storage, index in self._summands:
            if storage not in saved and released[storage] == index + 1:
                released[storage] = index
