"""What a fake run assumes of values that depend on activations, where a model reads them.

Choices (the experts of a token, the largest score) are taken in turn, which spreads them evenly;
draws that decide whether a layer is dropped keep it; checks over a whole tensor (``all``, ``any``,
``isnan``) come out as they do in a run where nothing is wrong; no two tensors are equal. Nothing
else is assumed. Depends on torch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
# Place of the result that says which ones were chosen.
_CHOICES = {
    _aten.topk.default: 1,
    _aten.sort.default: 1,
    _aten.sort.stable: 1,
    _aten.max.dim: 1,
    _aten.min.dim: 1,
    _aten.argsort.default: 0,
    _aten.argsort.stable: 0,
    _aten.argmax.default: 0,
    _aten.argmin.default: 0,
    _aten.multinomial.default: 0,
}
_DRAWS = {_aten.rand, _aten.rand_like, _aten.uniform_, _aten.uniform}
# Draws of more numbers are noise, not decisions.
_MOST_DRAWS = 64
_USUAL = {_aten.all: True, _aten._is_all_true: True, _aten.any: False, _aten._is_any_true: False}
_NEGATIONS = {_aten.logical_not, _aten.bitwise_not}
_PASSED_ON = {_aten.view, _aten._to_copy, _aten.clone, _aten.alias, _aten.detach, _aten.squeeze}


def assumed_results(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Those results of an op whose values are assumed, and the values."""
    packet = func.overloadpacket
    if packet in _DRAWS and results[0].numel() <= _MOST_DRAWS:
        return [(r, torch.full(tuple(r.shape), 0.5, dtype=r.dtype)) for r in results]
    if packet is _aten.isnan:
        return [(results[0], torch.zeros(results[0].shape, dtype=torch.bool))]
    if func not in _CHOICES:
        return []
    index = results[_CHOICES[func]]
    in_turn = torch.arange(index.numel()) % _choices(func, args, kwargs)
    return [(index, in_turn.reshape(tuple(index.shape)))]


def _choices(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """How many there are to choose from."""
    source, dim = args[0], kwargs.get("dim", -1)
    for position, argument in enumerate(func._schema.arguments[: len(args)]):
        if argument.name == "dim":
            dim = args[position]
    if dim is None or not source.dim():
        return max(1, int(source.numel()))
    return max(1, int(source.shape[dim]))


def assumed_decision(func: Any, args: Sequence[Any]) -> bool | None:
    """The usual value of a truth that is read; None where there is no usual one."""
    if func is _aten.equal.default:
        return False
    if func is not _aten._local_scalar_dense.default or args[0].dtype is not torch.bool:
        return None
    node, negated = getattr(args[0], "_memfit_node", None), False
    while isinstance(node, fx.Node) and node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _USUAL:
            return _USUAL[packet] != negated
        negated ^= packet in _NEGATIONS
        if packet not in _NEGATIONS | _PASSED_ON:
            return None
        node = node.args[0]
    return None
