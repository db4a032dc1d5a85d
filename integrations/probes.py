"""Compares samples of recomputed tensors with those of the forward.

What a forward reads beside tensors and attributes of modules, such as a global number, is baked
into a recording and may have changed since. A sample of each dropped tensor that no other is made
from notices that. On a CPU the comparison is immediate; on a GPU its result is read in a later
forward. Depends on the records of a forward.
"""

from math import gcd
from typing import Any, Protocol

import torch

from memfit.integrations.recording import Value
from memfit.integrations.schedules import view_as
from memfit.planner.step_graph import SAMPLE_ELEMENTS

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Verdict:
    """Comparisons of a plan's regions whose results are still on a device.

    They are sent to the host when the next forward begins, and read once they have arrived: to wait
    for them would leave the device idle. Copies begin empty.
    """

    __slots__ = ("_differing", "_message", "_sent", "_sized")

    def __init__(self) -> None:
        self._differing: dict[torch.device, torch.Tensor] = {}
        """Bits that differed in any comparison, by the place in a sample."""
        self._sized: dict[tuple[torch.device, int], torch.Tensor] = {}
        """As many of them as a sample has."""
        self._message = ""
        self._sent: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def add(self, differing: torch.Tensor, message: str) -> None:
        """Notes the bits in which a sample differs, as whole numbers."""
        device, size = differing.device, differing.numel()
        if (device, size) not in self._sized:
            if device not in self._differing:
                most = 2 * SAMPLE_ELEMENTS  # complex elements are two numbers each
                self._differing[device] = torch.zeros(most, dtype=torch.int64, device=device)
            self._sized[device, size] = self._differing[device][:size]
        self._sized[device, size].bitwise_or_(differing)
        self._message = message

    def read(self) -> None:
        """Raises if anything that has arrived differed."""
        waiting = []
        for bits, arrived in self._sent:
            if not arrived.query():  # type: ignore[no-untyped-call]
                waiting.append((bits, arrived))
            elif bool(bits.any()):
                self._sent = []
                raise RuntimeError(self._message)
        self._sent = waiting
        for device, bits in self._differing.items():
            there = torch.empty(bits.shape, dtype=bits.dtype, pin_memory=True)
            there.copy_(bits, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(device))
            self._sent.append((there, arrived))
        self._differing.clear()
        self._sized.clear()

    def __reduce__(self) -> Any:
        return Verdict, ()


class _Judged(Protocol):
    verdict: Verdict


class Probe:
    """Samples one tensor."""

    __slots__ = ("_base", "_message", "_offset", "_size", "_stride", "_value")

    def __init__(self, value: Value, base: Value, name: str) -> None:
        self._value, self._base = value, base
        self._size, self._stride = _line_through(value)
        self._offset = value.offset - base.offset
        self._message = (
            f"{name}, recomputed for the backward, is not what it was in the forward "
            "that a memfit plan recorded: the forward depends on something that has changed since "
            "and that is neither an argument nor an attribute of its modules, such as a global. "
            "Make it a plain attribute (int, float, bool or str) of the module, or remove() the "
            "plan; gradients of this step are wrong"
        )

    def sample(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a few elements of ``value``."""
        offset = int(tensor.storage_offset())
        return torch.as_strided_copy(tensor.detach(), (self._size,), (self._stride,), offset)

    def compare(self, tensor: torch.Tensor, sample: torch.Tensor, call: _Judged) -> None:
        """Compares ``value`` in a recomputed ``base`` to the bit, so that NaN equals NaN."""
        if not self._size:
            return
        if self._value.dtype != self._base.dtype:
            tensor = view_as(tensor, self._base, self._value)
            again = self._line(tensor, int(tensor.storage_offset()))
        else:
            again = self._line(tensor, int(tensor.storage_offset()) + self._offset)
        if tensor.device.type == "cuda":
            call.verdict.add(_bits(again) ^ _bits(sample), self._message)
        elif not torch.equal(again, sample) and not torch.equal(_bits(again), _bits(sample)):
            raise RuntimeError(self._message)

    def _line(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        return tensor.as_strided((self._size,), (self._stride,), offset)


def _bits(line: torch.Tensor) -> torch.Tensor:
    """The elements as whole numbers."""
    if line.dtype.is_complex:
        line = torch.view_as_real(line).flatten()
    return line.view(_WHOLE_NUMBERS[line.itemsize])


def _line_through(value: Value) -> tuple[int, int]:
    """Size and stride of evenly spaced elements: through all memory of a tensor without gaps, else
    along its diagonal."""
    count = 1
    sizes = sorted(zip(value.stride, value.shape, strict=True))
    dense = True
    for stride, size in sizes:
        dense = dense and (size == 1 or stride == count)
        count *= size
    if dense:
        step = max(1, count // SAMPLE_ELEMENTS)
        while gcd(step, count) > 1:  # else it would meet the same rows or columns for ever
            step -= 1
        return min(SAMPLE_ELEMENTS, count), step
    size = min(SAMPLE_ELEMENTS, count, max(value.shape))
    step = sum(s * (n // size) for s, n in sizes) if size else 1
    return size, step
