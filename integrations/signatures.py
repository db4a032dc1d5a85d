"""What a call of a region depends on beside the values of tensors: calls with equal keys run the
same ops on the same shapes, as far as that can be known without running them.

Depends on torch and the planner's shims.
"""

import enum
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from memfit.planner._compat import is_wrapped, storage_key

Place = tuple[dict[str, Any], str]

_TENSORS = (torch.Tensor, nn.Parameter)
_SCALARS = frozenset({int, float, bool, str})
_VALUES = (
    *_SCALARS, type(None), complex, bytes, range, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


@dataclass(slots=True)
class Entry:
    """A call of a region, before it runs."""

    key: tuple[Any, ...]
    arguments: list[torch.Tensor]
    """All tensors in the arguments."""
    places: list[Place]
    """Where the region's parameters and buffers are found: they may be swapped until they are
    needed again, so that no tensor is held here."""


class Unreadable(Exception):
    """Something that a key cannot describe, in words."""


class Reader:
    """Describes the calls of one module.

    This runs before every call, so that speed matters: of the hundreds of attributes in a region's
    modules few are plain numbers, and which is found out anew only when the name or the type of any
    changes. Nothing of the module is held.
    """

    def __init__(self) -> None:
        self._layouts: list[tuple[int, _Getter]] = []
        """For each module how many attributes it has, and what takes those that are its own."""
        self._kinds: list[type] | None = None
        """Types of what they take: never none at all."""
        self._plain: list[bool] = []
        """Which are plain numbers, switches or words,"""
        self._names: tuple[str, ...] = ()
        """and their names and types."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """Describes a call of ``module``; raises :class:`Unreadable`."""
        key: list[Any] = []
        tensors: list[torch.Tensor] = []
        for device in device_types():
            key.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
        _describe(args, key, tensors)
        if kwargs:
            _describe(kwargs, key, tensors)
        if len(tensors) > 1:
            _describe_aliases(tensors, key)
        owners = _attributes_in(module)
        self._describe_attributes(owners, key)
        places = _describe_held(owners, key)
        return Entry(tuple(key), tensors, places)

    def _describe_attributes(self, owners: list[dict[str, Any]], key: list[Any]) -> None:
        """A scale, a rate or a switch is baked into recorded ops. ``training`` is among them."""
        values = self._values(owners)
        if list(map(type, values)) != self._kinds:
            self._learn(owners)
            values = self._values(owners)
        key.append(self._names)
        key += compress(values, self._plain)

    def _values(self, owners: list[dict[str, Any]]) -> list[Any]:
        """All own attributes; fewer if there are others than there were."""
        values: list[Any] = []
        try:
            for attributes, (count, own) in zip(owners, self._layouts, strict=True):
                if len(attributes) == count:
                    values += own(attributes)
        except (KeyError, ValueError):
            return []
        return values

    def _learn(self, owners: list[dict[str, Any]]) -> None:
        own = [[name for name in attributes if name not in _TORCHS] for attributes in owners]
        counts = map(len, owners)
        self._layouts = [(n, itemgetter(*names)) for n, names in zip(counts, own, strict=True)]
        self._kinds = kinds = list(map(type, self._values(owners)))
        self._plain = [kind in _SCALARS for kind in kinds]
        named = [f"{i}.{name}" for i, names in enumerate(own) for name in names]
        named = [f"{n}: {k.__name__}" for n, k in zip(named, kinds, strict=True)]
        self._names = tuple(compress(named, self._plain))


_Getter = Callable[[dict[str, Any]], tuple[Any, ...]]
# What torch gives every module. A getter takes two of them at least, so that it returns a tuple.
_TORCHS = frozenset(nn.Module().__dict__) - {"training", "_is_full_backward_hook"}


def _attributes_in(module: nn.Module) -> list[dict[str, Any]]:
    """Those of each of the modules in ``module``, and its own."""
    seen = {module}
    found = [module.__dict__]
    for attributes in found:
        if children := attributes["_modules"]:
            for child in children.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child.__dict__)
    return found


def _describe_held(owners: list[dict[str, Any]], key: list[Any]) -> list[Place]:
    """Parameters and buffers, and where they are."""
    places = []
    for attributes in owners:
        for held in (attributes["_parameters"], attributes["_buffers"]):
            if not held:
                continue
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if type(tensor) not in _TENSORS or tensor.layout is not torch.strided:
                    raise Unreadable(f"its {name} is a {_kind(tensor)}")
                key.append(tensor.requires_grad)
                places.append((held, name))
    return places


@functools.cache
def device_types() -> tuple[str, ...]:
    """Device types that ops may run on, by the names that autocast has for them."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _kind(tensor: torch.Tensor) -> str:
    if tensor.layout is not torch.strided:
        return f"tensor of layout {tensor.layout}"
    if type(tensor) in _TENSORS:
        return "tensor of inference mode" if tensor.is_inference() else "tensor of a transform"
    return f"{type(tensor).__name__}, which has its own ways to run ops"


def _describe(value: Any, key: list[Any], tensors: list[torch.Tensor]) -> None:
    kind = type(value)
    if kind in _TENSORS:
        if value.layout is not torch.strided or value.is_inference() or is_wrapped(value):
            raise Unreadable(f"it is given a {_kind(value)}")
        tensors.append(value)
        key += (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
    elif value is None or kind in _SCALARS:
        key += (kind, value)
    elif kind is tuple or kind is list:
        key += (kind, len(value))
        for item in value:
            _describe(item, key, tensors)
    elif kind is dict:
        key += (kind, len(value))
        for name, item in value.items():
            key.append(name)
            _describe(item, key, tensors)
    else:
        _describe_rare(value, key, tensors)


def _describe_rare(value: Any, key: list[Any], tensors: list[torch.Tensor]) -> None:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        raise Unreadable(f"it is given a {_kind(value)}")
    if isinstance(value, _VALUES):
        key += (kind, value)
    elif isinstance(value, (tuple, list)):
        key.append(kind)
        _describe((*value,), key, tensors)
    elif isinstance(value, dict):
        key.append(kind)
        _describe({**value}, key, tensors)
    elif isinstance(value, types.FunctionType) and not (value.__closure__ or value.__defaults__):
        key += (value.__code__, value.__module__)  # a lambda is another one in every call
    elif isinstance(value, (type, types.BuiltinFunctionType)):
        key.append(value)
    else:
        raise Unreadable(f"it is given a {kind.__name__}, whose tensors cannot be told")


def _describe_aliases(tensors: list[torch.Tensor], key: list[Any]) -> None:
    """Arguments in one storage are read relative to each other."""
    storages = [storage_key(tensor) for tensor in tensors]
    if len(set(storages)) == len(storages):
        return
    first: dict[int, tuple[int, int]] = {}
    for index, (storage, tensor) in enumerate(zip(storages, tensors, strict=True)):
        start = int(tensor.storage_offset())
        owner, origin = first.setdefault(storage, (index, start))
        key += (owner, start - origin)
