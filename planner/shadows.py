"""Real values for small tensors of a fake run, so that data-dependent code takes eager's branches.

Token ids, masks and positions decide which kernels a model runs (an all-ones mask is dropped, a
length read with ``.item()``). A tensor whose inputs all have a real value, its *shadow*, is also
computed for real; views and in-place results share storage with their shadows as they do in eager.
Values that depend on activations have no shadow. Depends on the fake tensor shims only.
"""

from collections.abc import Iterable
from typing import Any

import torch

from memfit.planner._compat import (
    DATA_DEPENDENT_ERRORS,
    FakeTensor,
    FakeTensorMode,
    real_execution,
    run_fake,
    storage_key,
)

MAX_ELEMENTS = 1 << 22


class UnknownValue(RuntimeError):
    """The model reads a value that depends on activations, which a fake run cannot know."""

    module = ""
    """FQN of the module that reads it."""


class Shadows:
    """Runs ops on fake tensors and keeps the real values that can be known."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._stale: set[int] = set()

    def set(self, fake: torch.Tensor, value: torch.Tensor) -> None:
        """Gives ``fake`` a copy of a real value; large tensors go without."""
        if value.numel() <= MAX_ELEMENTS and value.device.type == "cpu":
            fake._memfit_shadow = value.detach().clone()  # type: ignore[attr-defined]

    def get(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The real value of ``tensor``, or None."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        if self._stale and storage_key(tensor) in self._stale:
            return None
        return getattr(tensor, "_memfit_shadow", None)

    def forget_storage(self, key: int) -> None:
        """Called when a storage dies, since its key may be used again."""
        self._stale.discard(key)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func`` on fake tensors; its shadows, where they can be known, on the results."""
        tensors = list(tensors_in((args, kwargs)))
        known = bool(tensors) or func in _FACTORIES
        known = known and all(self.get(t) is not None for t in tensors)
        known = known and torch.Tag.nondeterministic_seeded not in func.tags
        try:
            out = run_fake(func, args, kwargs)
        except DATA_DEPENDENT_ERRORS as error:
            if not known:
                raise UnknownValue(str(func)) from error
            return self.adopt(self._run_real(func, args, kwargs))
        results = list(tensors_in(out))
        if known and results and all(_is_small(t) for t in results):
            for fake, value in zip(
                results, tensors_in(self._run_real(func, args, kwargs)), strict=True
            ):
                fake._memfit_shadow = value  # type: ignore[attr-defined]
        elif func._schema.is_mutable:
            self._stale.update(storage_key(t) for t in results if isinstance(t, FakeTensor))
        return out

    def _run_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with real_execution():
            return func(*self._real(args), **self._real(kwargs))

    def _real(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.get(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, (tuple, list)):
            return type(value)(self._real(v) for v in value)
        if isinstance(value, dict):
            return {key: self._real(v) for key, v in value.items()}
        return value

    def adopt(self, value: Any) -> Any:
        """``value`` with a fake tensor that knows its values in place of every real one."""
        if isinstance(value, torch.Tensor):
            fake = self._mode.from_tensor(value)
            self.set(fake, value)
            return fake
        if isinstance(value, (tuple, list)):
            return type(value)(self.adopt(v) for v in value)
        return value


_FACTORIES = frozenset(
    {
        torch.ops.aten.arange.default,
        torch.ops.aten.arange.start,
        torch.ops.aten.arange.start_step,
        torch.ops.aten.full.default,
        torch.ops.aten.ones.default,
        torch.ops.aten.zeros.default,
        torch.ops.aten.scalar_tensor.default,
    }
)


def tensors_in(value: Any) -> Iterable[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= MAX_ELEMENTS and tensor.device.type != "meta"
