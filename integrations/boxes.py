"""What autograd holds in place of the tensors that it saves, where they are kept.

Depends on torch alone.
"""

from typing import Any, Protocol

import torch


class Packed(Protocol):
    """Stands for a saved tensor."""

    def take(self) -> torch.Tensor:
        """The tensor, for the backward."""


class Box:
    """Keeps a tensor, and notices when it is written to: with hooks autograd itself does not."""

    __slots__ = ("tensor", "version")

    tensor: torch.Tensor
    version: int

    def fill(self, tensor: torch.Tensor) -> None:
        """Keeps ``tensor``: not itself, since that could refer to the node that keeps it."""
        self.version = tensor._version
        self.tensor = tensor if tensor.grad_fn is None else tensor.detach()

    def take(self) -> torch.Tensor:
        """The tensor, as it was."""
        if self.tensor._version != self.version:
            raise modified(self.tensor, self.version)
        return self.tensor


class Late:
    """Stands for a tensor of which it is not decided yet whether it is kept."""

    __slots__ = ("target",)

    def __init__(self, box: Box) -> None:
        self.target: Packed = box

    def take(self) -> torch.Tensor:
        """The tensor, for the backward."""
        return self.target.take()


def boxed(tensor: torch.Tensor) -> Box:
    """A box with ``tensor`` in it."""
    box = Box()
    box.fill(tensor)
    return box


def unpack(packed: Packed) -> torch.Tensor:
    """Saved tensor hook."""
    return packed.take()


def modified(tensor: Any, version: int) -> RuntimeError:
    """What autograd says in this case."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; "
        f"expected version {version} instead. It is kept, or needed to recompute what is not, "
        "by a memfit plan"
    )
