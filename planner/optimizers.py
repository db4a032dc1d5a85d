"""Optimizers for the captured step: their state is resident, their temporaries part of the
timeline.

Depends on torch.optim. An optimizer is made anew for the fake parameters; one step is run unseen,
so that the captured one is a step of the steady state with all state allocated.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from memfit.planner._compat import FakeOps, FakeTensor, another_fake
from memfit.planner.errors import MemfitError, first_line
from memfit.planner.recorder import Recorder
from memfit.planner.shadows import tensors_in
from memfit.planner.step_graph import Kind

_NAMED: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "adamax": (torch.optim.Adamax, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3}),
    "sgd_momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
}


class OptimizerError(MemfitError, ValueError):
    """An optimizer that cannot be planned for."""


@dataclass(frozen=True, slots=True)
class OptimizerFactory:
    """Makes the optimizer of a fake twin from the parameter groups, by name, of the real one."""

    name: str
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    groups: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] | None
    """Parameter FQNs and options of each group; None: all trainable parameters, one group."""
    max_grad_norm: float | None = None
    """To what the gradients are clipped first."""

    def ready(self, named: Mapping[str, nn.Parameter], recorder: Recorder) -> torch.optim.Optimizer:
        """The optimizer of fake parameters after its first step, its state declared resident.

        ``named`` holds shared ones under each of their names.
        """
        if self.groups is None:
            groups = [{"params": [p for p in dict.fromkeys(named.values()) if p.requires_grad]}]
        else:
            groups = [
                {**options, "params": [named[n] for n in names]} for names, options in self.groups
            ]
        try:
            with _NumbersAreOne():
                update = self.make(groups)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise OptimizerError(
                f"{self.name} cannot be made anew for planning: {error}"
            ) from error
        with FakeOps():  # type: ignore[no-untyped-call]
            kin = _alike(update)
            for first in kin:
                first.grad = torch.zeros_like(first)
            self.run(update)
            update.zero_grad(set_to_none=True)
            common = {id(t) for t in tensors_in(_without_state(update))}
            for first, others in kin.items():
                for other in others:
                    update.state[other] = _another(update.state[first], common)
        names = {id(p): name for name, p in named.items()}
        for parameter, state in update.state.items():
            for key, value in state.items():
                for tensor in tensors_in(value):
                    name = f"{names.get(id(parameter), parameter)}.{key}"
                    recorder.add_resident(tensor, Kind.OPTIMIZER, name)
        return update

    def run(self, update: torch.optim.Optimizer) -> None:
        """One step; :class:`OptimizerError` when it cannot run on fake tensors."""
        try:
            norm = None
            if self.max_grad_norm is not None:
                parameters = [p for group in update.param_groups for p in group["params"]]
                norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            with _NumbersAreOne():
                update.step()
            del norm  # is there to be logged after the step
        except Exception as error:
            raise OptimizerError(
                f"a step of {self.name} cannot be captured: {type(error).__name__}: "
                f"{first_line(error)}; plan with a named optimizer of the same "
                f"state, such as {', '.join(_NAMED)}"
            ) from error


class _NumbersAreOne(TorchFunctionMode):
    """Answers an optimizer that reads a number: its count of steps, or a weight's norm.

    Such numbers scale updates or stand in tables (8-bit state); no memory hangs on them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.item, torch.Tensor.tolist) and args[0].is_floating_point():
            return _ones(args[0].shape if func is torch.Tensor.tolist else ())
        return func(*args, **(kwargs or {}))


def _ones(shape: Sequence[int]) -> Any:
    """A number, or lists of lists of them."""
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def optimizer_factory(
    optimizer: str | torch.optim.Optimizer | None,
    model: nn.Module,
    *,
    on_gpu: bool,
    max_grad_norm: float | None = None,
) -> OptimizerFactory | None:
    """Reads the arguments ``optimizer`` and ``max_grad_norm`` of ``plan``.

    ``on_gpu`` is the target device, whose optimizers take foreach kernels by default.
    Raises :class:`OptimizerError` for an unknown name or an optimizer of another model.
    """
    if optimizer is None:
        if max_grad_norm is not None:
            raise OptimizerError(
                f"max_grad_norm is {max_grad_norm!r}, but gradients are clipped just before an "
                "optimizer step, which is not planned; name the optimizer"
            )
        return None
    return replace(_factory(optimizer, model, on_gpu), max_grad_norm=max_grad_norm)


def _factory(
    optimizer: str | torch.optim.Optimizer, model: nn.Module, on_gpu: bool
) -> OptimizerFactory:
    if isinstance(optimizer, str):
        return _named(optimizer, foreach=on_gpu)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(
            f"optimizer is {optimizer!r}; pass a name ({', '.join(_NAMED)}) or a "
            "torch.optim.Optimizer over the model's parameters"
        )
    _refuse_uncounted(optimizer, on_gpu)
    return _like(optimizer, model, foreach=on_gpu)


def _refuse_uncounted(optimizer: torch.optim.Optimizer, on_gpu: bool) -> None:
    """Optimizers of bitsandbytes whose memory no op shows."""
    cls = type(optimizer)
    if not any(base.__module__.partition(".")[0] == "bitsandbytes" for base in cls.__mro__):
        return
    if getattr(optimizer, "is_paged", False):
        raise OptimizerError(
            f"{cls.__name__} is paged: its state moves between the GPU and the host, which a plan "
            "does not count; take one that is not (optim='adamw_bnb_8bit', AdamW8bit)"
        )
    if not on_gpu:
        raise OptimizerError(
            f"{cls.__name__} of bitsandbytes allocates within its ops on a CPU, which a plan does "
            "not see; plan for a GPU (device='h100'), or train with torch.optim.AdamW"
        )


def _named(name: str, foreach: bool) -> OptimizerFactory:
    if name.lower() not in _NAMED:
        raise OptimizerError(
            f"unknown optimizer {name!r}; known are {', '.join(_NAMED)}, or pass a "
            "torch.optim.Optimizer over the model's parameters"
        )
    cls, options = _NAMED[name.lower()]
    return OptimizerFactory(name.lower(), lambda g: cls(g, foreach=foreach, **options), None)  # type: ignore[call-arg]


def _like(optimizer: torch.optim.Optimizer, model: nn.Module, foreach: bool) -> OptimizerFactory:
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    groups = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        if options.get("foreach", ...) is None and not options.get("fused"):
            options["foreach"] = foreach
        if missing := [p for p in group["params"] if id(p) not in names]:
            raise OptimizerError(
                f"{type(optimizer).__name__} holds {len(missing)} parameters that are not the "
                "model's; make it from model.parameters()"
            )
        groups.append((tuple(names[id(p)] for p in group["params"]), options))
    cls: Callable[..., torch.optim.Optimizer] = type(optimizer)
    # bitsandbytes keeps in attributes how many bits its state has.
    made_with = {**_without_state(optimizer), **optimizer.defaults}
    defaults = {k: v for k, v in made_with.items() if k in _keywords(cls) and k != "params"}
    return OptimizerFactory(type(optimizer).__name__, lambda g: cls(g, **defaults), tuple(groups))


def _alike(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, list[torch.Tensor]]:
    """Trainable parameters of a group with the same shape and dtype, by the first of them.

    An optimizer keeps the same for each, so that a step of the first shows what.
    """
    first: dict[object, torch.Tensor] = {}
    kin: dict[torch.Tensor, list[torch.Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad:
                key = number, parameter.shape, parameter.stride(), parameter.dtype
                if (known := first.setdefault(key, parameter)) is parameter:
                    kin[parameter] = []
                else:
                    kin[known].append(parameter)
    return kin


def _without_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The attributes that hold nothing of a parameter's."""
    return {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}


def _another(state: Any, common: Collection[int]) -> Any:
    """The same for another parameter; what is no tensor, or ``common`` to all, is as it was."""
    if isinstance(state, torch.Tensor):
        if id(state) in common:
            return state
        return another_fake(state) if isinstance(state, FakeTensor) else state.clone()
    if isinstance(state, dict):
        return {key: _another(value, common) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_another(value, common) for value in state)
    return state


def _keywords(cls: Callable[..., Any]) -> Iterable[str]:
    import inspect

    return inspect.signature(cls).parameters
