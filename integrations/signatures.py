"""What a call of a region depends on beside the values of tensors: calls with equal keys run the
same ops on the same shapes, as far as that can be known without running them.

Depends on torch and the planner's shims.
"""

import enum
import functools
import types
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
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


def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
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
    places: list[Place] = []
    for owner in module.modules():
        attributes = owner.__dict__
        # A scale, a rate or a switch is baked into recorded ops. ``training`` is among them.
        key += [v for v in attributes.values() if type(v) in _SCALARS]
        for held in (attributes["_parameters"], attributes["_buffers"]):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if type(tensor) not in _TENSORS or tensor.layout is not torch.strided:
                    raise Unreadable(f"its {name} is a {_kind(tensor)}")
                key.append(tensor.requires_grad)
                places.append((held, name))
    return Entry(tuple(key), tensors, places)


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
    elif isinstance(value, torch.Tensor):
        raise Unreadable(f"it is given a {_kind(value)}")
    elif isinstance(value, _VALUES):
        key += (kind, value)
    elif isinstance(value, (tuple, list)):
        key += (kind, len(value))
        for item in value:
            _describe(item, key, tensors)
    elif isinstance(value, dict):
        key += (kind, len(value))
        for name, item in value.items():
            key.append(name)
            _describe(item, key, tensors)
    elif isinstance(value, types.FunctionType) and not (value.__closure__ or value.__defaults__):
        key += (value.__code__, value.__module__)  # a lambda is another one in every call
    elif isinstance(value, (type, types.BuiltinFunctionType)):
        key.append(value)
    else:
        raise Unreadable(f"it is given a {kind.__name__}, whose tensors cannot be told")


def _describe_aliases(tensors: list[torch.Tensor], key: list[Any]) -> None:
    """Arguments in one storage are read relative to each other."""
    first: dict[int, tuple[int, int]] = {}
    for index, tensor in enumerate(tensors):
        start = int(tensor.storage_offset())
        owner, origin = first.setdefault(storage_key(tensor), (index, start))
        key += (owner, start - origin)
