"""What stands for the ``forward`` of a planned module: the part that all actions share, and the
one that checkpoints.

A module keeps its name, parameters and hooks; only its instance's ``forward`` is shadowed, and
``restore`` takes that away again. Depends on torch and the planner's errors.
"""

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memfit.planner.errors import MemfitError


class ApplyError(MemfitError, RuntimeError):
    """A plan does not go with a model, or with what else was switched on in it."""


class MemfitWarning(UserWarning):
    """A plan cannot be kept to in full; gradients are right, memory may be more than planned."""


class PlannedForward:
    """Stands for a module's ``forward``.

    Holds its module weakly, so that a model is freed as soon as it is dropped; copies and pickles
    go with the copy of the module.
    """

    def __init__(self, module: nn.Module, shadowed: Callable[..., Any] | None) -> None:
        self._module = weakref.ref(module)
        self._shadowed = shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            return _uncompiled(self._run, args, kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward as the plan has it."""
        raise NotImplementedError

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward())

    def restore(self, module: nn.Module) -> None:
        """Gives the module its own forward back."""
        del module.__dict__["forward"]
        if self._shadowed is not None:
            module.__dict__["forward"] = self._shadowed

    def _forward(self) -> Callable[..., Any]:
        """What the module would run without a plan."""
        return self._shadowed or partial(type(self._own()).forward, self._own())

    def _own(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ApplyError("the planned module is gone; keep the model while its forward is used")
        return module

    def _options(self) -> tuple[Any, ...]:
        """Further arguments of the constructor."""
        return ()

    def __reduce__(self) -> Any:
        return type(self), (self._own(), self._shadowed, *self._options())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        module = self._own()
        shadowed, options = copy.deepcopy((self._shadowed, self._options()), memo)
        return type(self)(memo.get(id(module), module), shadowed, *options)


# In one graph, inductor recomputes a layer while others are under way: it peaked up to 14 % over
# budgets with torch's checkpointing, up to 39 % with its selective one.
@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="memfit runs a region that recomputes uncompiled, to keep it near its budget"
)
def _uncompiled(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a region of a model that is compiled: the graph breaks here."""
    warnings.warn(
        "a planned model is compiled: its regions that recompute run uncompiled, and the step's "
        "peak is near the planned one, not equal to it, since what the compiler holds is not "
        "planned for. Plan with a tenth of the budget to spare, or do not compile",
        MemfitWarning,
        stacklevel=3,
    )
    return run(*args, **kwargs)


class CheckpointedForward(PlannedForward):
    """Checkpoints the forward while gradients are recorded."""

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward()
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


class TurnsForward(PlannedForward):
    """A forward for each of the times that a module is called in a step; None runs it as it is."""

    def __init__(
        self,
        module: nn.Module,
        shadowed: Callable[..., Any] | None,
        forwards: tuple[PlannedForward | None, ...],
    ) -> None:
        super().__init__(module, shadowed)
        self._forwards = forwards
        self._turn = 0

    def _options(self) -> tuple[Any, ...]:
        return (self._forwards,)

    def restart(self) -> None:
        """The next call is a step's first."""
        self._turn = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward()(*args, **kwargs)
        planned = self._forwards[self._turn % len(self._forwards)]
        self._turn += 1
        return (planned or self._forward())(*args, **kwargs)
