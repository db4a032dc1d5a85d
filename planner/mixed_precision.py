"""FSDP2's own mixed precision: what a step computes in another dtype than the shards have.

Shards keep the dtype of the parameters, as the optimizer does; gathered, they are cast to
``param_dtype``, and so is what their modules are given; gradients are reduced in ``reduce_dtype``
(torch/distributed/fsdp/_fully_shard/_fsdp_api.py, ``MixedPrecisionPolicy``). Depends on torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from memfit.planner.errors import ShardingError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of what FSDP2 gathers and reduces; None: as it is."""

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None

    def gathered(self, own: torch.dtype) -> torch.dtype:
        """Of a gathered parameter whose shards have the dtype ``own``, and of its gradient."""
        return self.param_dtype if self.param_dtype and own.is_floating_point else own

    def reduced(self, own: torch.dtype) -> torch.dtype:
        """In which its gradient is reduced."""
        return self.reduce_dtype or self.gathered(own)


@dataclass(frozen=True, slots=True)
class Casts:
    """Makes a fake twin compute as modules whose parameters FSDP2 gathers in ``dtype``."""

    dtype: torch.dtype
    modules: Sequence[str]
    """FQNs of those that ``fully_shard`` is called on."""

    def cast(self, value: Any) -> Any:
        """``value`` in ``dtype`` if it is a tensor of floating point numbers."""
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating else value

    def cast_inputs(self, twin: nn.Module) -> None:
        """Adds hooks that cast what the modules are called with."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return tree_map(self.cast, args), tree_map(self.cast, kwargs)

        for name in self.modules:
            twin.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True)


def read_precision(param_dtype: Any, reduce_dtype: Any) -> Precision:
    """Reads the arguments of ``plan``: dtypes or their names."""
    return Precision(_dtype("param_dtype", param_dtype), _dtype("reduce_dtype", reduce_dtype))


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """As ``plan`` takes it and a plan has it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.") if dtype else None


def _dtype(argument: str, name: Any) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and dtype not in _DTYPES:
        raise ShardingError(
            f"{argument} is {name!r}; known are 'bfloat16', 'float16' and 'float32'"
        )
    return dtype
