"""Reads from a model what FSDP2's ``fully_shard`` made of it, to plan for the model as it was.

A plan is made from whole parameters; a sharded model has none, and cannot be copied. So a twin
without parameters' memory is made before, and what was sharded is read from the model afterwards.
Depends on torch's FSDP2 (its private state: nothing public tells groups) and the planner.
"""

import copy
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from memfit.integrations.forwards import ApplyError
from memfit.planner.document import Workload
from memfit.planner.fingerprint import unsharded_class
from memfit.planner.mixed_precision import dtype_name

_LEAVE = ", which is not planned; leave it out, or train without a plan"


@dataclass(frozen=True, slots=True)
class Sharded:
    """How a model is sharded, as ``plan`` takes it."""

    world_size: int
    wrap: tuple[str, ...]
    reshard_after_forward: bool | None
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None

    def options(self) -> dict[str, Any]:
        """Arguments of ``plan``."""
        return {"sharding": "fsdp2"} | asdict(self)


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
    found = {
        (group.mesh_info.shard_mesh_size, group.mp_policy.param_dtype, group.mp_policy.reduce_dtype)
        for group in groups.values()
    }
    if len(found) != 1:
        raise ApplyError(
            f"parts of the model are sharded over different meshes or in different dtypes{_LEAVE}"
        )
    ((world_size, param_dtype, reduce_dtype),) = found
    reshards = None if own_is_whole else True
    return Sharded(world_size, _wrap(model, wholes), reshards, param_dtype, reduce_dtype)


def refuse_other_sharding(workload: Workload, model: nn.Module) -> None:
    """Raises :class:`ApplyError` for a model that is sharded otherwise than it was planned."""
    found = read_sharded(model)
    planned = workload.world_size, workload.param_dtype, workload.reduce_dtype
    for what, expected, own in zip(
        ("world_size", "param_dtype", "reduce_dtype"),
        planned,
        (found.world_size, dtype_name(found.param_dtype), dtype_name(found.reduce_dtype)),
        strict=True,
    ):
        if expected != own:
            raise ApplyError(
                f"the plan was made for {what}={expected!r}, and {unsharded_class(model).__name__} "
                f"is sharded with {own!r}; make it with plan(..., {what}={own!r})"
            )


def _states(model: nn.Module) -> dict[Any, list[str]]:
    """States of FSDP2 and the FQNs of the modules of each, in the order that it was given them."""
    names = {module: name for name, module in model.named_modules()}
    states = (m._get_fsdp_state() for m in names if is_sharded(m))
    return {state: [names[m] for m in state._modules] for state in states}


def _refuse_what_is_not_planned(group: Any) -> None:
    name = group.modules[0].__class__.__name__.removeprefix("FSDP")
    if group.offload_policy.__class__.__name__ != "OffloadPolicy":
        raise ApplyError(f"the parameters of {name} are offloaded to the CPU{_LEAVE}")
    if hasattr(group.mesh_info, "replicate_mesh_size"):
        raise ApplyError(
            f"{name} is sharded and replicated (HSDP), which is not planned; use fully "
            "sharded processes, or train without a plan"
        )
    if group.mp_policy.output_dtype or not group.mp_policy.cast_forward_inputs:
        raise ApplyError(
            f"FSDP2 casts what {name} returns, or not what it is given, which is not planned; "
            "pass a MixedPrecisionPolicy with param_dtype and reduce_dtype alone"
        )


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
