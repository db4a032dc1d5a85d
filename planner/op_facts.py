"""Facts about one aten call: its signature, what it writes to, the dtype that it works in.

Depends on torch alone.
"""

import enum
import types
from collections.abc import Iterable
from typing import Any

import torch

from memfit.planner._compat import is_wrapped
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


_READABLE = (
    int, float, bool, str, complex, bytes, range, type(None), type, enum.Enum, torch.dtype,
    torch.device, torch.layout, torch.memory_format, types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip


def unreadable(value: Any) -> str:
    """What among a call's arguments holds tensors that cannot be told, in words; empty if nothing.

    Such a call cannot be recognised when it comes again.
    """
    if isinstance(value, torch.Tensor):
        return "a tensor of a transform" if is_wrapped(value) else ""
    if isinstance(value, (tuple, list)):
        return next(filter(None, map(unreadable, value)), "")
    if isinstance(value, dict):
        return next(filter(None, map(unreadable, value.values())), "")
    if isinstance(value, _READABLE):
        return ""
    return f"a {type(value).__name__}, whose tensors cannot be told"


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


_aten = torch.ops.aten
_DYNAMIC_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READS_VALUES = {_aten._local_scalar_dense, _aten.equal}
# Statistics that move with every run; decisions: where two values are near, the smallest
# difference upstream would route a token elsewhere; and a result that is memory for the backward,
# of which a part is never written.
_ONCE = {
    _aten.mkldnn_rnn_layer,
    _aten._cudnn_rnn,
    _aten.miopen_rnn,
    _aten.lift_fresh,  # a constant from Python, perhaps another one in the next call
    _aten.lift_fresh_copy,
    _aten.native_batch_norm,
    _aten._native_batch_norm_legit,
    _aten._batch_norm_with_update,
    _aten.cudnn_batch_norm,
    _aten.miopen_batch_norm,
    _aten.topk,
    _aten.sort,
    _aten.argsort,
    _aten.argmax,
    _aten.argmin,
    _aten.multinomial,
}


_BLANK = {_aten.empty_like, _aten.new_empty, _aten.new_empty_strided, _aten.empty}
_BLANK |= {_aten.empty_strided}


def runs_once(func: Any) -> bool:
    """Whether running an op a second time must be avoided: of ops not torch's own, nobody knows."""
    return func.namespace != "aten" or func.overloadpacket in _ONCE


def makes_blank(func: Any) -> bool:
    """Whether an op returns memory that nothing is written to yet.

    Of its tensor arguments it takes the shape alone.
    """
    return func.overloadpacket in _BLANK


def is_dynamic(func: Any, args: Iterable[Any]) -> bool:
    """Whether what an op returns, or its shape, is read from values; ``args`` may be fx nodes."""
    packet = func.overloadpacket
    if packet in (_aten.index, _aten.index_put, _aten.index_put_):
        return any(_dtype(i) in (torch.bool, torch.uint8) for i in _indices(args))
    return packet in _READS_VALUES or not _DYNAMIC_TAGS.isdisjoint(func.tags)


def _indices(args: Iterable[Any]) -> list[Any]:
    _, indices, *_ = args
    return [i for i in indices if i is not None]


def _dtype(tensor: Any) -> Any:
    return tensor.meta["dtype"] if hasattr(tensor, "meta") else tensor.dtype
