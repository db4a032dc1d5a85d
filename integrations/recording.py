"""Records what one forward of a region runs, while it runs.

The ops become a :class:`memfit.planner.program.Program`, with the same instructions and names as
the planner's recorder finds on fake tensors, and with what the program leaves out: functions,
arguments, and every tensor as a view of a storage. Depends on the planner's program, op facts and
shims, and on torch.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memfit.integrations.boxes import Box, Late, boxed, unpack
from memfit.integrations.signatures import Entry
from memfit.planner._compat import TorchDispatchMode, is_own_output, is_wrapped, storage_key
from memfit.planner.op_facts import is_dynamic, makes_blank, runs_once, written_tensors
from memfit.planner.program import Instruction, Pack, Program
from memfit.planner.shadows import tensors_in

_aten = torch.ops.aten
_MOVES_STORAGE = frozenset({_aten.set_, _aten.resize_, _aten.resize_as_})
_CONSTANTS = frozenset({_aten.lift_fresh, _aten.lift_fresh_copy})
_GENERATORS = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as a view of a storage."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Root:
    """A tensor from outside through which a storage can be read again."""

    is_argument: bool
    index: int
    """Among the tensors of the arguments, or the places of parameters and buffers."""
    value: Value
    is_leaf: bool
    """Whether it is a parameter that is trained."""


@dataclass(frozen=True, slots=True)
class Step:
    """One op, with values in place of tensors."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[tuple[int, str], ...]
    """The storages that it allocates, with the way to them from its result: ``[0]``."""
    device: torch.device
    """Whose generator it draws from, if it is random."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A forward of a region, as it can be run again."""

    program: Program
    steps: tuple[Step, ...]
    packed: tuple[Value, ...]
    tied: frozenset[int]
    """Which of the packed tensors may refer to the node that saves them."""
    bases: dict[int, Value]
    """For each storage that the program makes: the result that the making op returns."""
    roots: dict[int, tuple[Root, ...]]
    """For each storage from outside that can be read again: how."""
    results: tuple[Value, ...]
    """The tensors that the forward returns."""


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode and saved tensor hooks that record a forward of ``module``."""

    def __init__(self, module: nn.Module, entry: Entry) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dynamic = ""
        """Why the forward cannot be run again in parts; empty when it can."""
        self.packed: list[Late] = []
        """What autograd saves, in order."""
        self.states: dict[int, bytes] = {}
        """Generator states before each random op."""
        self._module = module
        self._path = [""]
        self._thread = 0
        self._steps: list[Step] = []
        self._instructions: list[Instruction] = []
        self._packs: list[Pack] = []
        self._values: list[Value] = []
        self._tied: set[int] = set()
        self._bases: dict[int, Value] = {}
        self._roots: dict[int, list[Root]] = {}
        self._live: dict[int, int] = {}
        self._watchers: dict[int, Any] = {}
        self._add_roots(entry)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled submodule runs as it is; what it makes is unknown here, and so kept."""
        return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Records what runs inside."""
        hooks = []
        self._thread = threading.get_ident()
        for name, module in self._module.named_modules():
            if name:
                hooks += self._follow(name, module)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, unpack), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._watchers.clear()

    def _follow(self, name: str, module: nn.Module) -> list[Any]:
        def enter(*_: Any) -> None:
            if threading.get_ident() == self._thread:
                self._path.append(name)

        def leave(*_: Any) -> None:
            if threading.get_ident() == self._thread:
                self._path.pop()

        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, prepend=True, always_call=True),
        ]

    def release(self) -> None:
        """Lets go of all tensors: autograd keeps the hook, and with it this object."""
        self.packed, self.states = [], {}

    def finish(self, out: Any) -> Recorded:
        """What was recorded, of a forward that returned ``out``."""
        results = [t for t in tensors_in(out) if self._can_follow([t])]
        return Recorded(
            Program(self._instructions, self._packs, self._roots),
            tuple(self._steps),
            tuple(self._values),
            frozenset(self._tied.union(*self._written())),
            self._bases,
            {storage: tuple(roots) for storage, roots in self._roots.items()},
            tuple(map(self._value, results)),
        )

    def _written(self) -> Iterator[Iterator[int]]:
        """What is written to may come to refer to any node."""
        for instruction in self._instructions:
            for storage in instruction.writes:
                yield (i for i, value in enumerate(self._values) if value.storage == storage)

    # -- storages --------------------------------------------------------------------------------

    def _add_roots(self, entry: Entry) -> None:
        for index, tensor in enumerate(entry.arguments):
            value = self._value(tensor)
            self._roots.setdefault(value.storage, []).append(Root(True, index, value, False))
        arguments = set(self._roots)
        for index, (held, name) in enumerate(entry.places):
            value = self._value(held[name])
            if value.storage in arguments:
                # The next call may be given another tensor: which of the two was read?
                self.dynamic = "it is given one of its own parameters as an argument"
            root = Root(False, index, value, held[name].is_leaf and held[name].requires_grad)
            self._roots.setdefault(value.storage, []).append(root)

    def _value(self, tensor: torch.Tensor) -> Value:
        if tensor.is_conj() or tensor.is_neg():
            self.dynamic = "it works on complex tensors that are conjugated lazily"
        storage = self._storage(tensor)
        offset = int(tensor.storage_offset())
        return Value(storage, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def _storage(self, tensor: torch.Tensor) -> int:
        key = storage_key(tensor)
        index = self._live.get(key)
        if index is None:
            index = self._live[key] = len(self._watchers)

            def died(_: Any) -> None:
                # The key may be another storage's soon.
                if self._live.get(key) == index:
                    del self._live[key]

            self._watchers[index] = weakref.ref(tensor.untyped_storage(), died)
        return index

    def _pack(self, tensor: torch.Tensor) -> Box | Late:
        late = Late(boxed(tensor))
        self.packed.append(late)
        if self._can_follow([tensor]):
            value = self._value(tensor)
            if is_own_output(tensor):
                self._tied.add(len(self._values))
            self._packs.append(Pack(value.storage, len(self._steps)))
            self._values.append(value)
        return late

    # -- ops -------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.prim.device.default, _aten.detach.default):
            return func(*args, **kwargs)
        if is_dynamic(func, args):
            self.dynamic = f"{func} depends on the values of tensors"
        elif func.overloadpacket in _MOVES_STORAGE:
            self.dynamic = f"{func} changes what a tensor stands on"
        if func.overloadpacket in _CONSTANTS:
            return self._make_alone(func, args, kwargs, once=True)
        if makes_blank(func):
            return self._make_alone(func, args, kwargs, blank=True)
        arguments = list(tensors_in((args, kwargs)))
        if not self._can_follow(arguments):
            return func(*args, **kwargs)
        reads = tuple(dict.fromkeys(map(self._storage, arguments)))
        named = self._replace(args), self._replace(kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        device = _device(arguments, kwargs)
        if random and device.type in _GENERATORS:
            # As bytes, which are not the allocator's: there is one for every random op.
            self.states[len(self._steps)] = generator(device).get_state().numpy().tobytes()
        out = func(*args, **kwargs)
        if not self._can_follow(list(tensors_in(out))):
            return out
        made = self._bind(out)
        written = dict.fromkeys(map(self._storage, written_tensors(func, args, kwargs)))
        self._steps.append(Step(func, *named, made, device))
        self._instructions.append(
            Instruction(
                self._path[-1],
                str(func),
                reads,
                tuple(storage for storage, _ in made),
                tuple(written),
                random,
                runs_once(func)
                or any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values()))
                or (random and device.type not in _GENERATORS)
                or not self._bases.keys() >= written.keys(),
            )
        )
        return out

    def _make_alone(
        self, func: Any, args: Any, kwargs: Any, *, once: bool = False, blank: bool = False
    ) -> Any:
        """Runs an op of one result that does not hang on values of tensors: a constant, or memory.

        It is recorded with what it takes to make such memory again.
        """
        out = func(*args, **kwargs)
        if not self._can_follow([out]):
            return out
        made = self._bind(out)
        like = {"dtype": out.dtype, "device": out.device}
        arguments = tuple(out.shape), out.stride()
        self._steps.append(Step(_aten.empty_strided.default, arguments, like, made, out.device))
        storages = tuple(storage for storage, _ in made)
        self._instructions.append(
            Instruction(self._path[-1], str(func), (), storages, once=once, blank=blank)
        )
        return out

    def _can_follow(self, tensors: list[torch.Tensor]) -> bool:
        """Whether the tensors stand on storages; others are not recorded, nor is the rest."""
        follow = all(t.layout is torch.strided and not is_wrapped(t) for t in tensors)
        if not follow:
            self.dynamic = "it works on sparse tensors, or on those of a function transform"
        return follow

    def _replace(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._value(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._replace, value))
        if isinstance(value, dict):
            return {name: self._replace(item) for name, item in value.items()}
        return value

    def _bind(self, out: Any) -> tuple[tuple[int, str], ...]:
        made = []
        for path, tensor in _results(out, ""):
            if storage_key(tensor) not in self._live:
                value = self._value(tensor)
                self._bases[value.storage] = value
                made.append((value.storage, path))
        return tuple(made)


def generator(device: torch.device) -> torch.Generator:
    """The generator that ops on ``device`` draw from by default."""
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _device(arguments: list[torch.Tensor], kwargs: dict[str, Any]) -> torch.device:
    if arguments:
        return arguments[0].device
    return torch.device(kwargs.get("device") or "cpu")


def _results(out: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(out, torch.Tensor):
        yield path, out
    elif isinstance(out, (tuple, list)):
        for position, item in enumerate(out):
            yield from _results(item, f"{path}[{position}]")
