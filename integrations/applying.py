"""Applies a plan to a live model: every region that recomputes runs under
``torch.utils.checkpoint``.

A region's module keeps its name, parameters and hooks; only its instance's ``forward`` is shadowed
by an object that checkpoints the original one. ``remove()`` takes it away again. Depends on the
planner's plan and fingerprint, and on torch; transformers is recognised by its attributes, never
imported.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memfit.planner.caching import caching_modules, without_cache
from memfit.planner.checkpointing import PLANNED_MARKER, checkpointed_module, is_planned
from memfit.planner.document import Plan
from memfit.planner.errors import MemfitError
from memfit.planner.fingerprint import differences, fingerprint


class ApplyError(MemfitError, RuntimeError):
    """A plan does not go with a model, or with what else was switched on in it."""


def apply(plan: Plan, model: nn.Module) -> "AppliedPlan":
    """Makes ``model`` train as ``plan`` says, and returns the handle that undoes it.

    Names of parameters and buffers, ``state_dict``, hooks and signatures stay as they are;
    gradients are bitwise those of the model without the plan. Raises :class:`ApplyError`, and
    changes nothing, when the plan was made for another model, or when checkpointing is already
    switched on.
    """
    if not isinstance(plan, Plan) or not isinstance(model, nn.Module):
        raise TypeError(
            f"apply() takes a plan and a model, got a {type(plan).__name__} and a "
            f"{type(model).__name__}"
        )
    _refuse_other_models(plan, model)
    _refuse_other_checkpointing(model)
    if unknown := [r for r in plan.regions if r.action not in ("keep", "checkpoint")]:
        raise ApplyError(
            f"the plan runs {unknown[0].name} as {unknown[0].action!r}, which this memfit cannot "
            "do; apply it with the memfit that made it, or make a plan with this one"
        )
    modules = {r.name: _submodule(model, r.name) for r in plan.regions}
    applied = AppliedPlan(plan, model)
    for region in plan.regions:
        if region.action == "checkpoint":
            applied.checkpoint(modules[region.name])
    return applied


class AppliedPlan:
    """A plan at work in a model; also a context manager that removes it at the end."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.plan = plan
        self._modules: list[nn.Module] = []
        self._hooks = [model.register_forward_pre_hook(_Guard(model), prepend=True)]
        self._hooks += [
            m.register_forward_pre_hook(without_cache, with_kwargs=True)
            for m in caching_modules(model)
        ]

    def checkpoint(self, module: nn.Module) -> None:
        """Makes one module recompute."""
        module.__dict__["forward"] = CheckpointedForward(module, module.__dict__.get("forward"))
        self._modules.append(module)

    def remove(self) -> None:
        """Leaves the model as it was before ``apply``. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        while self._modules:
            module = self._modules.pop()
            forward = module.__dict__.get("forward")
            if isinstance(forward, CheckpointedForward):
                forward.restore(module)

    def __enter__(self) -> "AppliedPlan":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class CheckpointedForward:
    """Stands for a module's ``forward`` and checkpoints it while gradients are recorded.

    Holds its module weakly, so that a model is freed as soon as it is dropped; copies and pickles
    go with the copy of the module.
    """

    def __init__(self, module: nn.Module, shadowed: Callable[..., Any] | None) -> None:
        self._module = weakref.ref(module)
        self._shadowed = shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward()
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

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

    def __reduce__(self) -> Any:
        return type(self), (self._own(), self._shadowed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CheckpointedForward":
        module = self._own()
        return type(self)(memo.get(id(module), module), copy.deepcopy(self._shadowed, memo))


class _Guard:
    """Runs before each forward of the model: notices checkpointing that was switched on later."""

    def __init__(self, model: nn.Module) -> None:
        setattr(self, PLANNED_MARKER, True)
        # Names, not modules: a hook that holds its model would keep it from being freed.
        self._switches = tuple(
            name for name, m in model.named_modules() if hasattr(m, "gradient_checkpointing")
        )

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if any(model.get_submodule(name).gradient_checkpointing for name in self._switches):
            raise ApplyError(
                f"activation checkpointing was switched on in {type(model).__name__} beside the "
                "plan; call model.activation_checkpointing_disable() to train by the plan, or "
                "remove() the plan to train with checkpointing"
            )


def _refuse_other_models(plan: Plan, model: nn.Module) -> None:
    found = differences(plan.model.fingerprint, fingerprint(model))
    if not found:
        return
    parameters = sum(p.numel() for p in model.parameters())
    raise ApplyError(
        f"the plan was made for a {plan.model.class_} with {plan.model.parameters} parameters; "
        f"this {type(model).__name__} with {parameters} has {', '.join(found)}. "
        "Make a plan for it with plan(model, budget)"
    )


def _refuse_other_checkpointing(model: nn.Module) -> None:
    if is_planned(model):
        raise ApplyError(
            f"{type(model).__name__} carries a plan already; call remove() on the handle that "
            "apply() returned first"
        )
    if (name := checkpointed_module(model)) is not None:
        raise ApplyError(
            f"activation checkpointing is switched on in {name}; call "
            "model.activation_checkpointing_disable() (or leave activation_checkpointing=False) "
            "before apply()"
        )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ApplyError(
            f"the plan names {name!r}, which {type(model).__name__} does not have; make a plan for "
            "this model"
        ) from error
