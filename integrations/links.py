"""How a region is given its input a second time, where a plan does not hold it.

A region that another one follows in a segment leaves a :class:`Source` in the plan's
:class:`Relay`; the next region finds it by the storage that it is given. What it needs of its input
in the backward it then asks a :class:`Link`, which runs the region before again, once. Depends on
boxes and on the records of a forward.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memfit.integrations.boxes import Packed, modified
from memfit.integrations.recording import Value
from memfit.integrations.schedules import view_as
from memfit.planner._compat import storage_key


class Remaker(Protocol):
    """A call of a region, as the region after it sees it."""

    def remake(self, storage: int, boxes: tuple[Packed, ...]) -> torch.Tensor:
        """The base of a storage that the region makes, from what is in the boxes."""


@dataclass(frozen=True, slots=True)
class Source:
    """How to make a result of a region again."""

    name: str
    call: Remaker
    base: Value
    """What the call makes."""
    boxes: tuple[Packed, ...]
    version: int
    """Of the result: one that was changed in place is no longer what would be made."""


class Relay:
    """Results that regions have just returned, until another one is given them.

    A result that is dropped takes its source with it. Copies begin empty.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[weakref.ref[torch.UntypedStorage], Source]] = {}

    def leave(self, tensor: torch.Tensor, source: Source) -> None:
        """Leaves the source of a result."""
        key, left = storage_key(tensor), self._left

        def died(reference: Any) -> None:
            if key in left and left[key][0] is reference:
                del left[key]

        left[key] = weakref.ref(tensor.untyped_storage(), died), source

    def take(self, tensor: torch.Tensor, names: frozenset[str]) -> Source | None:
        """The source of an argument, if it has one of these names."""
        reference, source = self._left.get(storage_key(tensor), (None, None))
        if source is None or source.name not in names or source.version != tensor._version:
            return None
        assert reference is not None and reference() is not None
        del self._left[storage_key(tensor)]
        return source

    def __reduce__(self) -> Any:
        return Relay, ()


class Given:
    """A storage that is made again on first demand, and then held."""

    __slots__ = ("_base", "_source")

    def __init__(self, source: Source) -> None:
        self._source: Source | None = source
        self._base: torch.Tensor | None = None

    def base(self) -> torch.Tensor:
        """What the region before makes of it."""
        if self._base is None:
            source = self._source
            assert source is not None
            self._base = source.call.remake(source.base.storage, source.boxes)
            self._source = None
        return self._base


class Link:
    """In the place of a box with an argument."""

    __slots__ = ("_given", "_of", "_value")

    def __init__(self, given: Given, source: Source, argument: torch.Tensor) -> None:
        self._given = given
        self._of = source.base
        offset = int(argument.storage_offset())
        shape, stride = tuple(argument.shape), argument.stride()
        self._value = Value(source.base.storage, offset, shape, stride, argument.dtype)

    def take(self) -> torch.Tensor:
        """The argument, as it was."""
        return view_as(self._given.base(), self._of, self._value)


class Passed:
    """Stands for a saved tensor in a linked argument. Holds it until the forward has returned."""

    __slots__ = ("_held", "_link", "_of", "_value", "_version")

    def __init__(self, tensor: torch.Tensor, link: Packed, of: Value, value: Value) -> None:
        self._held: torch.Tensor | None = tensor
        self._version = tensor._version
        self._link: Packed | None = link
        self._of = of
        self._value = value

    def drop(self) -> None:
        """The tensor is to be made again."""
        self._held = None

    def keep(self) -> None:
        """Becomes as good as a box."""
        assert self._held is not None
        self._held = self._held.detach()
        self._link = None

    def take(self) -> torch.Tensor:
        """The tensor, for the backward."""
        if self._held is None:
            assert self._link is not None
            return view_as(self._link.take(), self._of, self._value)
        if self._held._version != self._version:
            raise modified(self._held, self._version)
        return self._held.detach()
