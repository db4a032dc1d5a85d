"""Compares samples of recomputed tensors with those of the forward.

What a forward reads beside tensors and attributes of modules, such as a global number, is baked
into a recording and may have changed since. A sample of each dropped tensor that no other is made
from notices that. On a CPU the comparison is immediate; on a GPU it would wait for the device, so
it is made up for at the region's next forward. Depends on the records of a forward.
"""

from math import gcd
from typing import Protocol

import torch

from memfit.integrations.recording import Value
from memfit.planner.step_graph import SAMPLE_ELEMENTS


class Verdict:
    """Comparisons of a region that are not read yet."""

    __slots__ = ("_differs", "_message")

    def __init__(self) -> None:
        self._differs: torch.Tensor | None = None
        self._message = ""

    def add(self, differs: torch.Tensor, message: str) -> None:
        """Notes the result of a comparison, which is still on the device."""
        self._differs = differs if self._differs is None else self._differs | differs
        self._message = message

    def read(self) -> None:
        """Raises if anything differed."""
        differs, self._differs = self._differs, None
        if differs is not None and bool(differs):
            raise RuntimeError(self._message)


class _Judged(Protocol):
    verdict: Verdict


class Probe:
    """Samples one tensor."""

    __slots__ = ("_message", "_size", "_stride", "value")

    def __init__(self, value: Value, region: str, name: str) -> None:
        self.value = value
        self._size, self._stride = _line_through(value)
        self._message = (
            f"{name} of {region}, recomputed for the backward, is not what it was in the forward "
            "that a memfit plan recorded: the forward depends on something that has changed since "
            "and that is neither an argument nor an attribute of its modules, such as a global. "
            "Make it a plain attribute (int, float, bool or str) of the module, or remove() the "
            "plan; gradients of this step are wrong"
        )

    def sample(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a few elements."""
        tensor = tensor.detach()
        start = tensor.storage_offset()
        return tensor.as_strided((self._size,), (self._stride,), start).clone()

    def compare(self, tensor: torch.Tensor, sample: torch.Tensor | None, call: _Judged) -> None:
        """Compares to the bit, so that NaN equals NaN."""
        if sample is None or not self._size:
            return
        again = self.sample(tensor).view(torch.uint8)
        if tensor.device.type == "cuda":
            call.verdict.add((again != sample.view(torch.uint8)).any(), self._message)
        elif not torch.equal(again, sample.view(torch.uint8)):
            raise RuntimeError(self._message)


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
