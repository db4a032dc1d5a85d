"""Applies a plan to a live model: every region that recomputes gets another ``forward``.

A region's module keeps its name, parameters and hooks; only its instance's ``forward`` is shadowed
by an object that runs the original one as the plan says. ``remove()`` takes it away again. Depends
on the planner's plan and fingerprint, the forwards of the actions, and torch; transformers is
recognised by its attributes, never imported.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any

from torch import nn

from memfit.integrations.forwards import ApplyError as ApplyError
from memfit.integrations.forwards import CheckpointedForward, PlannedForward, TurnsForward
from memfit.integrations.links import Relay
from memfit.integrations.probes import Verdict
from memfit.integrations.selective import SelectiveForward
from memfit.integrations.sharded import is_sharded, refuse_other_sharding
from memfit.planner._compat import uncompiled
from memfit.planner.caching import caching_modules, without_cache
from memfit.planner.checkpointing import (
    PLANNED_MARKER,
    SWITCH_OFF,
    checkpointed_module,
    is_planned,
)
from memfit.planner.document import ACTIONS, Plan, RegionPlan
from memfit.planner.fingerprint import differences, fingerprint

# What the regions of a plan share.
_Common = tuple[Relay, Verdict]


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
    model = uncompiled(model)
    _refuse_other_models(plan, model)
    _refuse_other_checkpointing(model)
    if unknown := [r for r in plan.regions if r.action not in ACTIONS]:
        raise ApplyError(
            f"the plan runs {unknown[0].name} as {unknown[0].action!r}, which this memfit cannot "
            "do; apply it with the memfit that made it, or make a plan with this one"
        )
    turns: dict[str, list[_Turn]] = {}
    for turn in _turns(plan.regions):
        turns.setdefault(turn.region.name, []).append(turn)
    modules = {name: _submodule(model, name) for name in turns}
    applied = AppliedPlan(plan, model)
    common = Relay(), Verdict()
    for name, own in turns.items():
        if any(turn.region.action != "keep" for turn in own):
            applied.shadow(modules[name], own, common)
    return applied


@dataclass(frozen=True, slots=True)
class _Turn:
    """One call of a region's module in a step."""

    region: RegionPlan
    followed: bool
    """Whether it makes the inputs of the next region again."""

    @property
    def key(self) -> object:
        """Equal for turns of a module that do the same."""
        region = self.region
        return region.action, region.keep, region.recompute_input, self.followed


def _turns(regions: Sequence[RegionPlan]) -> list[_Turn]:
    if regions and regions[0].recompute_input:
        raise ApplyError(
            f"the plan gives {regions[0].name} its input again, but there is no region before it; "
            "make the plan again"
        )
    turns = [
        _Turn(region, bool(after and after.recompute_input))
        for region, after in zip_longest(regions, regions[1:])
    ]
    for turn in turns:
        if turn.followed and turn.region.action != "selective":
            raise ApplyError(
                f"the plan has {turn.region.name} make the input of the region after it again, but "
                f"runs it as {turn.region.action!r}; make the plan again"
            )
    return turns


class AppliedPlan:
    """A plan at work in a model; also a context manager that removes it at the end."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.plan = plan
        self._modules: list[nn.Module] = []
        self._hooks = [model.register_forward_pre_hook(_Guard(plan, model), prepend=True)]
        self._hooks += [
            m.register_forward_pre_hook(without_cache, with_kwargs=True)
            for m in caching_modules(model)
        ]

    def shadow(self, module: nn.Module, turns: Sequence[_Turn], common: _Common) -> None:
        """Gives a module the forwards of its turns: as many as it is called in a step."""
        shadowed = module.__dict__.get("forward")
        known: dict[object, PlannedForward | None] = {}
        for turn in turns:
            if turn.key not in known:
                known[turn.key] = _planned_forward(module, shadowed, turn, common)
        forwards = tuple(known[turn.key] for turn in turns)
        first, *others = forwards
        if all(other is first for other in others):
            assert first is not None
            module.__dict__["forward"] = first
        else:
            module.__dict__["forward"] = TurnsForward(module, shadowed, forwards)
        self._modules.append(module)

    def remove(self) -> None:
        """Leaves the model as it was before ``apply``. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        while self._modules:
            module = self._modules.pop()
            forward = module.__dict__.get("forward")
            if isinstance(forward, PlannedForward):
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


def _planned_forward(
    module: nn.Module, shadowed: Callable[..., Any] | None, turn: _Turn, common: _Common
) -> PlannedForward | None:
    region = turn.region
    if region.action == "keep":
        return None
    if region.action == "checkpoint":
        return CheckpointedForward(module, shadowed)
    linked = region.recompute_input
    return SelectiveForward(
        module, shadowed, region.keep, region.name, linked, turn.followed, *common
    )


class _Guard:
    """Runs before each forward of the model: notices checkpointing that was switched on later, and
    lets modules that are called several times begin with the first."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        setattr(self, PLANNED_MARKER, True)
        self._sharding = plan.workload if plan.workload.sharding == "fsdp2" else None
        self._together = self._sharding is None and any(
            region.recompute_input for region in plan.regions
        )
        times = Counter(region.name for region in plan.regions)
        self._turns = tuple(name for name, count in times.items() if count > 1)
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
        if self._sharding and is_sharded(model):
            refuse_other_sharding(self._sharding, model)
            self._sharding = None
        if self._together and is_sharded(model):
            raise ApplyError(
                f"the plan recomputes modules of {type(model).__name__} together, of which FSDP2 "
                "gathers the weights one by one; make it with plan(..., sharding='fsdp2')"
            )
        for name in self._turns:
            forward = model.get_submodule(name).__dict__.get("forward")
            if isinstance(forward, TurnsForward):
                forward.restart()


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
            f"activation checkpointing is switched on in {name}; {SWITCH_OFF} before apply()"
        )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ApplyError(
            f"the plan names {name!r}, which {type(model).__name__} does not have; make a plan for "
            "this model"
        ) from error
