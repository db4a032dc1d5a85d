"""Real values for small tensors of a fake run, so that data-dependent code takes eager's branches.

Token ids, masks and positions decide which kernels a model runs (an all-ones mask is dropped, a
length read with ``.item()``). A tensor whose inputs all have a real value, its *shadow*, is also
computed for real; views and in-place results share storage with their shadows as they do in eager.
Values that depend on activations have no shadow, or one that is assumed (:mod:`assumptions`).
Depends on the assumptions and the fake tensor shims.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from memfit.planner._compat import (
    DATA_DEPENDENT_ERRORS,
    FakeTensor,
    FakeTensorMode,
    new_fake,
    reading_values,
    real_execution,
    run_fake,
    storage_key,
)
from memfit.planner.assumptions import assumed_decision, assumed_results

MAX_ELEMENTS = 1 << 22


class UnknownValue(RuntimeError):
    """The model reads a value that depends on activations, which a fake run cannot know."""

    module = ""
    """FQN of the module that reads it."""


class Shadows:
    """Runs ops on fake tensors and keeps the real values that can be known."""

    def __init__(self, mode: FakeTensorMode, module: Callable[[], str]) -> None:
        self._mode = mode
        self._module = module
        self._stale: set[int] = set()
        self._assumed: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed of values that the model's course depends on, for people."""
        if not self._assumed:
            return ()
        first, *more = self._assumed
        others = f" and {len(more)} more modules" if more else ""
        return (
            f"the course of {first or 'the model'}{others} depends on activations: choices (of "
            "experts, of the largest) are assumed to spread evenly, masks to select everything, "
            "checks to pass, layers not to be dropped, NumPy to compute with zeros; part of the "
            "budget is left free",
        )

    def set(self, fake: torch.Tensor, value: torch.Tensor) -> None:
        """Gives ``fake`` a copy of a real value, on the CPU; large tensors go without."""
        if value.numel() <= MAX_ELEMENTS and value.device.type != "meta":
            with real_execution():
                copied = value.detach().to("cpu", copy=True)
            fake._memfit_shadow = copied  # type: ignore[attr-defined]

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
        assumed = any(hasattr(t, "_memfit_assumed") for t in tensors)
        try:
            out = run_fake(func, args, kwargs)
        except DATA_DEPENDENT_ERRORS as error:
            if assumed:
                self.assume()
            if known:
                made = self.adopt(self._run_real(func, args, kwargs), _device_of(tensors))
                return self._marked(made, assumed)
            if self._shape_is_known(func, tensors):
                return self._shaped(func, args, kwargs)
            return self._decide(func, args, error)
        results = list(tensors_in(out))
        if results and all(_is_small(t) for t in results):
            if known:
                values = tensors_in(self._run_real(func, args, kwargs))
                for fake, value in zip(results, values, strict=True):
                    fake._memfit_shadow = value  # type: ignore[attr-defined]
                return self._marked(out, assumed)
            with real_execution():
                made = assumed_results(func, args, kwargs, results)
            for fake, value in made:
                fake._memfit_shadow = value  # type: ignore[attr-defined]
                self._marked(fake, True)
        if not known and func._schema.is_mutable:
            self._stale.update(storage_key(t) for t in results if isinstance(t, FakeTensor))
        return out

    def _shape_is_known(self, func: Any, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the shapes of the results do not depend on activations but by masks."""
        if func in _SHAPED_BY_MASKS:
            return True
        if func not in _SHAPED_BY_WHOLE_NUMBERS:
            return False
        if func is torch.ops.aten.nonzero.default:
            return tensors[0].dtype is torch.bool
        return all(
            t.is_floating_point() or t.dtype is torch.bool or self.get(t) is not None
            for t in tensors
        )

    def _shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Results of the shapes that masks and lengths give them.

        Zeros stand for activations; a mask that depends on them is assumed to select everything.
        """
        with real_execution():
            real = func(*self._stood_in(args), **self._real(kwargs))
        device = _device_of(tensors_in((args, kwargs)))
        made = [torch.empty_like(t, device=device) for t in tensors_in(real)]
        return made[0] if isinstance(real, torch.Tensor) else type(real)(made)

    def _stood_in(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._stood_in(v) for v in value)
        if not isinstance(value, torch.Tensor) or self.get(value) is not None:
            return self._real(value)
        if value.dtype is torch.bool:  # a mask that depends on activations
            self.assume()
        number = float(value.dtype is torch.bool)
        return torch.full((), number, dtype=value.dtype).expand(value.shape)

    def _marked(self, value: Any, assumed: bool) -> Any:
        if assumed:
            for tensor in tensors_in(value):
                tensor._memfit_assumed = True  # type: ignore[attr-defined]
        return value

    def _decide(self, func: Any, args: tuple[Any, ...], error: Exception) -> Any:
        """A yes or no that depends on activations, where the usual answer is clear."""
        answer = assumed_decision(func, args)
        if answer is None:
            raise self.unknown(str(func)) from error
        self.assume()
        return answer

    def assume(self) -> None:
        """Notes that the course of the module that runs rests on an assumption."""
        self._assumed[self._module()] = None

    def unknown(self, what: str) -> UnknownValue:
        """The error for a value that is read but cannot be known."""
        error = UnknownValue(what)
        error.module = self._module()
        return error

    def _run_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with real_execution():
            args, kwargs = self._real(args), self._real(kwargs)
            if func is _HISTC and not args[0].is_floating_point():
                # Whole numbers are counted on CUDA alone; no CPU kernel does it.
                return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
            return func(*args, **kwargs)

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

    def adopt(self, value: Any, device: torch.device | None = None) -> Any:
        """``value`` with a fake tensor that knows its values in place of every real one.

        Fake tensors are on ``device``, or left out where the real ones are.
        """
        if isinstance(value, torch.Tensor):
            if device is None or device == value.device:
                fake = self._mode.from_tensor(value)
            else:
                fake = new_fake(self._mode, value, device)
            self.set(fake, value)
            return fake
        if isinstance(value, (tuple, list)):
            return type(value)(self.adopt(v, device) for v in value)
        return value


class ReadsOfValues(TorchFunctionMode):
    """Answers what reads a tensor's values without passing the dispatcher."""

    def __init__(self, shadows: Shadows) -> None:
        super().__init__()
        self._shadows = shadows

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READS and isinstance(args[0], FakeTensor):
            with reading_values():
                return func(self._real(func, args[0]), *args[1:], **(kwargs or {}))
        if func is torch.Tensor.__format__ and not args[0].dim():  # as of the number that it holds
            return format(args[0].item(), *args[1:])
        if func in (torch.tensor, torch.as_tensor) and args:
            args = (self._plain(args[0]), *args[1:])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], self._plain_lists(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _real(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        value = self._shadows.get(tensor)
        if value is not None:
            return value.detach()
        if func not in _FOR_NUMPY or not tensor.is_floating_point():
            raise self._shadows.unknown("values of a tensor")
        self._shadows.assume()
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def _plain_lists(self, index: Any) -> Any:
        """An index, its lists of numbers without tensors."""
        if type(index) is not tuple:
            return self._plain(index) if type(index) is list else index
        return tuple(self._plain(i) if type(i) in (tuple, list) else i for i in index)

    def _plain(self, value: Any) -> Any:
        """Numbers in place of the fake tensors in a list."""
        if type(value) in (tuple, list):
            return type(value)(self._plain(v) for v in value)
        if isinstance(value, FakeTensor) and not value.dim():
            with reading_values():
                return self._real(torch.Tensor.item, value).item()
        return value


_FOR_NUMPY = (torch.Tensor.numpy, torch.Tensor.__array__)
_READS = (torch.Tensor.tolist, *_FOR_NUMPY)
_HISTC = torch.ops.aten.histc.default
_SHAPED_BY_MASKS = (torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default)
_SHAPED_BY_WHOLE_NUMBERS = frozenset(
    {
        torch.ops.aten.nonzero.default,
        torch.ops.aten._ctc_loss.default,
        torch.ops.aten._ctc_loss.Tensor,
    }
)
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


def _device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    return next((t.device for t in tensors), torch.device("cpu"))


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= MAX_ELEMENTS and tensor.device.type != "meta"
