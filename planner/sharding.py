"""How a step is spread over processes, and what one of them holds beside the step of one alone.

Depends on the step's records, on torch, and on ``fsdp2`` for what that lays over a step.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from memfit.planner.errors import ShardingError
from memfit.planner.fsdp2 import Unit, with_fsdp2
from memfit.planner.mixed_precision import Casts, Precision, read_precision
from memfit.planner.step_graph import Kind, StepGraph, Storage

DDP, FSDP2 = "ddp", "fsdp2"


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a step is spread over processes."""

    kind: str | None
    """``"ddp"``, ``"fsdp2"``, or None in one process."""
    world_size: int
    wrap: tuple[str, ...] = ()
    """What ``fully_shard`` is called on, the model itself aside, as ``plan`` takes it."""
    units: tuple[Unit, ...] = ()
    """That and the model itself."""
    reshard_after_forward: bool | None = None
    """As ``fully_shard`` is told."""
    precision: Precision = field(default_factory=Precision)
    """As ``fully_shard`` is told."""

    @property
    def casts(self) -> Casts | None:
        """What a capture has to cast."""
        dtype = self.precision.param_dtype
        names = [module for unit in self.units for module in unit.modules]
        return Casts(dtype, tuple(names)) if dtype else None

    @property
    def shards(self) -> int:
        """Into how many pieces each parameter is cut."""
        return self.world_size if self.kind == FSDP2 else 1

    @property
    def gathered(self) -> tuple[str, ...]:
        """FQNs of modules whose parameters are whole in their own forward and backward only."""
        return tuple(module for unit in self.units for module in unit.modules if module)

    def over(
        self, step: StepGraph, model: nn.Module, *, keep_gradients: bool, stages: bool
    ) -> StepGraph:
        """The step of one process, from that of one alone."""
        if self.kind == DDP:
            return _with_buckets(step, model)
        if self.kind == FSDP2:
            return with_fsdp2(
                step,
                model,
                self.units,
                self.world_size,
                self.precision,
                keep_gradients=keep_gradients,
                stages=stages,
            )
        return step


def read_sharding(
    sharding: str | None,
    world_size: int,
    wrap: Sequence[str] | None,
    reshard_after_forward: bool | None,
    param_dtype: Any,
    reduce_dtype: Any,
    model: nn.Module,
) -> Sharding:
    """Reads the arguments of ``plan`` that say how the step is spread over processes."""
    if sharding not in (None, DDP, FSDP2):
        raise ShardingError(f"unknown sharding {sharding!r}; known are {DDP!r} and {FSDP2!r}")
    if world_size < 1 or (world_size > 1) != (sharding is not None):
        raise ShardingError(
            f"world_size is {world_size} and sharding {sharding!r}; several processes need both, "
            "such as world_size=8, sharding='fsdp2', and one process neither"
        )
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ShardingError(
            f"{type(model).__name__} is sharded already; plan for the model as it is before "
            "fully_shard() and apply the plan to it before or after, at will"
        )
    of_fsdp2 = wrap, reshard_after_forward, param_dtype, reduce_dtype
    if sharding != FSDP2 and any(option is not None for option in of_fsdp2):
        raise ShardingError(
            "wrap, reshard_after_forward, param_dtype and reduce_dtype say how FSDP2 shards; pass "
            "sharding='fsdp2' too"
        )
    if sharding != FSDP2:
        return Sharding(sharding, world_size)
    if scalars := [name for name, p in model.named_parameters() if p.dim() == 0]:
        raise ShardingError(
            f"FSDP2 cannot shard {scalars[0]}, a parameter without dimensions; plan for 'ddp'"
        )
    if wrap is None:
        wrap = _layers(model)
    units = _units(model, wrap, reshard_after_forward)
    precision = read_precision(param_dtype, reduce_dtype)
    return Sharding(FSDP2, world_size, tuple(wrap), units, reshard_after_forward, precision)


def _layers(model: nn.Module) -> list[str]:
    """Classes that transformers does not split over devices, where there are several of one."""
    times = Counter(type(module).__name__ for module in model.modules())
    return [c for c in getattr(model, "_no_split_modules", None) or () if times[c] > 1]


def _units(model: nn.Module, wrap: Sequence[str], reshards: bool | None) -> tuple[Unit, ...]:
    """The model and what ``wrap`` names: a class, an FQN, or several FQNs joined by ``+``.

    By default all but the model are gathered again for the backward; what ends in ``:whole`` is
    not, whatever ``fully_shard`` is told for the others.
    """
    modules = dict(model.named_modules())
    units = [Unit(("",), reshards is True)]
    for entry in wrap:
        names = entry.removesuffix(":whole")
        again = reshards is not False and names == entry
        found = [n for n, m in modules.items() if n and type(m).__name__ == names]
        if found:
            outer = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
            units += [Unit((name,), again) for name in outer]
        elif all(n and n in modules for n in names.split("+")):
            units.append(Unit(tuple(names.split("+")), again))
        else:
            raise ShardingError(
                f"{type(model).__name__} has no module of the class {entry!r}, nor of that name"
            )
    times = Counter(module for unit in units for module in unit.modules)
    if twice := [module for module, count in times.items() if count > 1]:
        raise ShardingError(f"wrap names {twice[0]} twice; fully_shard() takes a module once")
    if len(units) == 1:
        raise ShardingError(
            f"{type(model).__name__} does not say which of its modules are layers "
            "(_no_split_modules); name their classes, such as wrap=['LlamaDecoderLayer']"
        )
    return tuple(units)


def _with_buckets(step: StepGraph, model: nn.Module) -> StepGraph:
    """DDP copies gradients into buckets, which it holds (``gradient_as_bucket_view=False``)."""
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    buckets = Storage(size, Kind.BUCKET, -1, len(step.ops), name="gradient buckets")
    return replace(step, storages=(*step.storages, buckets))
