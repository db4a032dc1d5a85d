"""The bytes alive in every slot of a planned step, as a plan file carries them.

A *slot* is one op that runs, recomputed ones included, in the order of the step. What changes from
slot to slot is a *column*: differences of 64-bit integers, compressed, in base64, because a step
has tens of thousands of slots and its layers are alike. Depends on the standard library alone;
``alive`` makes the record.
"""

import base64
import binascii
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import sub

from memfit.planner.errors import PlanError

# What bytes are taken for, in the order in which they are stacked: what stays comes first.
PARAMETERS = "parameters"
OPTIMIZER = "optimizer state"
OTHER = "other"
"""Buffers, constants, Python numbers, generator states and samples."""
BATCH = "batch"
GATHERED = "gathered parameters"
"""Whole parameters of a sharded model, while they are needed."""
COLLECTIVES = "collectives"
"""What parameters are gathered into, and gradients reduced from."""
GRADIENTS = "gradients"
KEPT = "kept activations"
"""Made by the forward and there when the backward begins."""
LOSS = "logits and loss"
"""What the model's last module gives to its loss, and what the loss and its backward make of it."""
RECOMPUTED = "recomputed"
TEMPORARIES = "temporaries"
WORKSPACE = "workspace"
KINDS = (
    *(PARAMETERS, OPTIMIZER, OTHER, BATCH, GATHERED, COLLECTIVES, GRADIENTS),
    *(KEPT, LOSS, RECOMPUTED, TEMPORARIES, WORKSPACE),
)

_ITEM_BYTES = 8


@dataclass(frozen=True, slots=True)
class AliveTensor:
    """A tensor that is alive at the peak, or several that are alike but for numbers in their names.

    The numbers then are ranges: ``model.layers.0-31.mlp``, ``foreach_sqrt[1-290]``.
    """

    module: str
    """FQN of the module that it belongs to; empty for the model itself."""
    name: str
    """Of the parameter, the argument or the op that made it."""
    kind: str
    shape: tuple[int, ...]
    dtype: str
    """Empty where there is no one shape and dtype, such as for workspace."""
    count: int
    size_bytes: int
    """Of each, as the allocator takes it."""

    @property
    def path(self) -> str:
        """Module and name."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return self.count * self.size_bytes


@dataclass(frozen=True, slots=True)
class MemoryTimeline:
    """What is alive in every slot; the kinds add up to the simulator's bytes."""

    slots: int
    phases: dict[str, int]
    """First slot of each phase of the step."""
    kinds: dict[str, str]
    """Column of bytes for each of :data:`KINDS` that the step has."""
    moments: tuple[str, ...]
    """Where in the step a slot can be, such as ``backward of model.layers.3``."""
    moment: str
    """Column of indices into ``moments``."""
    ops: tuple[str, ...]
    op: str
    """Column of indices into ``ops``."""
    at_peak: tuple[AliveTensor, ...]
    """All that is alive in the slot of most bytes, largest first."""

    def bytes_by_kind(self) -> dict[str, list[int]]:
        """Bytes alive in each slot by what they are."""
        return {kind: self._column(text, f"kinds.{kind}") for kind, text in self.kinds.items()}

    def moment_of_slots(self) -> list[str]:
        """Where in the step each slot is."""
        return self._words(self.moments, self.moment, "moment")

    def op_of_slots(self) -> list[str]:
        """The op that runs in each slot."""
        return self._words(self.ops, self.op, "op")

    def _words(self, words: tuple[str, ...], text: str, key: str) -> list[str]:
        indices = self._column(text, key)
        if indices and not (min(indices) >= 0 and max(indices) < len(words)):
            raise _damaged(key, f"it points beyond {len(words)} entries")
        return [words[i] for i in indices]

    def _column(self, text: str, key: str) -> list[int]:
        try:
            return decode_column(text, self.slots)
        except ValueError as error:
            raise _damaged(key, str(error)) from error


def encode_column(values: Sequence[int]) -> str:
    """A column as text; ``values`` and their differences are 64-bit integers."""
    changes = array("q", map(sub, values, (0, *values)))
    return base64.b64encode(zlib.compress(_little_endian(changes).tobytes())).decode("ascii")


def decode_column(text: str, count: int) -> list[int]:
    """Inverse of :func:`encode_column`; ``ValueError`` unless it holds ``count`` values."""
    size_bytes = count * _ITEM_BYTES
    try:
        packed = base64.b64decode(text, validate=True)
        # A damaged file does not unpack to more than there may be.
        data = zlib.decompressobj().decompress(packed, size_bytes + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(str(error)) from error
    if len(data) != size_bytes:
        raise ValueError(f"it does not hold {count} values")
    changes = array("q")
    changes.frombytes(data)
    return list(accumulate(_little_endian(changes)))


def _little_endian(values: "array[int]") -> "array[int]":
    """``values`` with the bytes of each in the order of files; its own inverse."""
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _damaged(key: str, why: str) -> PlanError:
    return PlanError(
        f"the plan's timeline cannot be read: $.timeline.{key}: {why}; make the plan again with "
        "`memfit plan`"
    )
