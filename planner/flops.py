"""Floating point operations of aten ops, by torch's own formulas.

Adds what those lack: CPU flash attention and grouped products in 2.13, attention with fewer heads
of keys than of queries in 2.11. Depends on torch.
"""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
}
_ATTENTION_BACKWARD = {
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
}


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Those of one op with its arguments and results; 0 for an op without a formula."""
    packet = func.overloadpacket
    if packet is torch.ops.aten._grouped_mm:
        # The rows, the columns or the summands of one product are split among the groups.
        rows, columns = args[0].shape, args[1].shape
        grouped_inside = len(rows) == len(columns) == 3
        return int(2 * (rows[0] if grouped_inside else 1) * rows[-2] * rows[-1] * columns[-1])
    if packet in _ATTENTION:
        return int(sdpa_flop_count(*_of_equal_heads(*args[:3])))  # type: ignore[no-untyped-call]
    if packet in _ATTENTION_BACKWARD:
        shapes = args[0].shape, *_of_equal_heads(*args[1:4])
        return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _of_equal_heads(query: torch.Tensor, *others: torch.Tensor) -> list[torch.Size]:
    """The shapes as the kernel works: a head of the keys for every head of the queries."""
    heads = query.shape[1]
    return [query.shape, *(torch.Size((t.shape[0], heads, *t.shape[2:])) for t in others)]
