"""Facts about one aten call: its signature, what it writes to, the dtype that it works in.

Depends on torch alone.
"""

from collections.abc import Iterable
from typing import Any

import torch

from memfit.planner.shadows import tensors_in


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that a call changes in place."""
    if not func._schema.is_mutable:
        return []
    written: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written.extend(tensors_in(value))
    return written


def signature(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The op with the shapes, dtypes and scalars of its arguments: equal for equal work."""
    parts = [_describe_argument(a) for a in args]
    parts += [f"{name}={_describe_argument(value)}" for name, value in kwargs.items()]
    return f"{func}({', '.join(parts)})"


def _describe_argument(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_describe_argument(v) for v in value)}]"
    return repr(value)


def work_dtype(tensors: Iterable[torch.Tensor]) -> str:
    """The first floating point dtype, such as ``bfloat16``; empty when there is none."""
    for tensor in tensors:
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return ""
