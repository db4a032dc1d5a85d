"""What autograd holds in place of the tensors that it saves, where they are kept.

Depends on torch and the planner's shims.
"""

import weakref
from typing import Any, Protocol

import torch

from memfit.planner._compat import storage_key


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


class Version:
    """What a parameter or buffer was in the forward. It may be put away until it is needed again,
    so that it is not held, but it must be the same one then."""

    __slots__ = ("_storage", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._storage = storage_key(tensor)
        self._version = tensor._version

    def check(self, tensor: torch.Tensor) -> None:
        """Raises if ``tensor`` is another one, or was written to."""
        if self._tensor() is not tensor or storage_key(tensor) != self._storage:
            raise RuntimeError(
                f"a parameter or buffer ({tensor.type()} {list(tensor.shape)}) that a memfit plan "
                "needs to recompute activations was replaced between the forward and its backward; "
                "replace it before the forward, or remove() the plan"
            )
        if tensor._version != self._version:
            raise modified(tensor, self._version)


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


def unpack(packed: Any) -> Any:
    """Saved tensor hook: a tensor that is packed as it is was never written to."""
    if not isinstance(packed, torch.Tensor):
        return packed.take()
    if packed._version:
        raise modified(packed, 0)
    return packed


def modified(tensor: Any, version: int) -> RuntimeError:
    """What autograd says in this case."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; "
        f"expected version {version} instead. It is kept, or needed to recompute what is not, "
        "by a memfit plan"
    )
