"""Reads from a model what FSDP2's ``fully_shard`` made of it, to plan for the model as it was.

A plan is made from whole parameters; a sharded model has none, and cannot be copied. So a twin
without parameters' memory is made before, and what was sharded is read from the model afterwards.
Depends on torch's FSDP2 (its private state: nothing public tells groups) and the planner.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memfit.integrations.forwards import ApplyError
from memfit.planner.fingerprint import unsharded_class

_LEAVE_OUT = "; leave it out, or train without MemfitCallback"


@dataclass(frozen=True, slots=True)
class Sharded:
    """How a model is sharded, as ``plan`` takes it."""

    world_size: int
    wrap: tuple[str, ...]
    reshard_after_forward: bool | None

    def options(self) -> dict[str, Any]:
        """Arguments of ``plan``."""
        return {
            "sharding": "fsdp2",
            "world_size": self.world_size,
            "wrap": self.wrap,
            "reshard_after_forward": self.reshard_after_forward,
        }


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the model."""
    return unsharded_class(model) is not type(model)


def read_sharded(model: nn.Module) -> Sharded:
    """Reads the groups of a model that ``fully_shard`` was called on.

    Raises :class:`ApplyError` that names what cannot be planned: parameters that are offloaded or
    replicated.
    """
    groups: dict[tuple[str, ...], Any] = {}
    for state, names in _states(model).items():
        for group in state._fsdp_param_groups:
            _refuse_what_is_not_planned(group)
            groups[tuple(names)] = group
    wholes = {names: group.post_forward_mesh_info is None for names, group in groups.items()}
    # Until the first forward the model's own group does not know that it will stay whole.
    root = model._get_fsdp_state()  # type: ignore[operator]
    own_is_whole = wholes.pop(("",), True) or root._auto_reshard_after_forward
    sizes = {int(group.mesh_info.shard_mesh_size) for group in groups.values()}
    if len(sizes) != 1:
        raise ApplyError(f"the model is sharded over meshes of several sizes, {sorted(sizes)}")
    return Sharded(sizes.pop(), _wrap(model, wholes), None if own_is_whole else True)


def _states(model: nn.Module) -> dict[Any, list[str]]:
    """States of FSDP2 and the FQNs of the modules of each, in the order that it was given them."""
    names = {module: name for name, module in model.named_modules()}
    states = (m._get_fsdp_state() for m in names if is_sharded(m))
    return {state: [names[m] for m in state._modules] for state in states}


def _refuse_what_is_not_planned(group: Any) -> None:
    name = group.modules[0].__class__.__name__.removeprefix("FSDP")
    if group.offload_policy.__class__.__name__ != "OffloadPolicy":
        raise ApplyError(f"the parameters of {name} are offloaded to the CPU{_LEAVE_OUT}")
    if hasattr(group.mesh_info, "replicate_mesh_size"):
        raise ApplyError(
            f"{name} is sharded and replicated (HSDP), which is not planned; use fully "
            "sharded processes, or train without MemfitCallback"
        )
    policy = group.mp_policy
    if policy.param_dtype or policy.reduce_dtype or policy.output_dtype:
        raise ApplyError(f"FSDP2 casts the parameters of {name} (mixed precision){_LEAVE_OUT}")


def _wrap(model: nn.Module, wholes: dict[tuple[str, ...], bool]) -> tuple[str, ...]:
    """Entries of ``plan(wrap=...)``: a class where all its modules are sharded alike, else FQNs."""
    classes = {names: unsharded_class(model.get_submodule(names[0])).__name__ for names in wholes}
    times = Counter(unsharded_class(module).__name__ for module in model.modules())
    alike = Counter((classes[names], whole) for names, whole in wholes.items() if len(names) == 1)
    entries = []
    for names, whole in wholes.items():
        cls = classes[names]
        of_class = len(names) == 1 and 1 < times[cls] == alike[cls, whole]
        entries.append((cls if of_class else "+".join(names)) + (":whole" if whole else ""))
    return tuple(dict.fromkeys(entries))


class Twin:
    """A model as it is before it is sharded, its parameters without memory."""

    def __init__(self, model: nn.Module) -> None:
        memo: dict[int, Any] = {id(p): _described(p) for p in model.parameters()}
        self.model = copy.deepcopy(model, memo)

    def like(self, sharded: nn.Module) -> nn.Module:
        """The twin with dtypes and trainable parameters as they are in the sharded model now."""
        made = {p: _described(p) for p in sharded.parameters()}
        for name, module in sharded.named_modules():
            own = self.model.get_submodule(name)
            for key, parameter in module._parameters.items():
                own._parameters[key] = None if parameter is None else made[parameter]
        return self.model

    def optimizer(self, update: torch.optim.Optimizer, sharded: nn.Module) -> torch.optim.Optimizer:
        """An optimizer of the sharded model as one of the twin; it is read, not run."""
        names = {p: name for name, p in sharded.named_parameters()}
        own = dict(self.model.named_parameters())
        twin = copy.copy(update)
        twin.param_groups = [
            group | {"params": [own[names[p]] for p in group["params"]]}
            for group in update.param_groups
        ]
        return twin


def _described(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
