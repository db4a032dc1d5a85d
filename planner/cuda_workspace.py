"""Memory that CUDA kernels allocate inside an op and free before it returns, by rule.

The rules are those of the kernels' sources under ``aten/src/ATen/native/cuda`` and were compared
with the allocator of an H100 (PyTorch 2.11, 2026-11), to the byte where nothing else is said.
Depends on the step's records and the device table.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from memfit.planner.devices import Device
from memfit.planner.simulate import round_up
from memfit.planner.step_graph import StepGraph
from memfit.planner.workspace import is_contiguous

_HALF = (torch.bfloat16, torch.float16)
_FLOAT_BYTES = _INT_BYTES = 4
_LONG_BYTES = 8
# What cuDNN's graphs take beside tensors.
_CUDNN_BYTES = 512
# At most so many indices are added by a kernel without workspace (``embedding_dense_backward``).
_FEW_INDICES = 3072
# ``NROWS_PER_THREAD`` of EmbeddingBackwardKernel.cu.
_ROWS_PER_THREAD = 10
# cub's radix sort of pairs of 64 bits takes at most this for a pair, and for all: as measured.
_SORT_PAIR_BYTES, _SORT_BYTES = 48, 80 * 1024
# Tensor cores read rows of this many channels of two bytes.
_CHANNELS = 8

_Rule = Callable[[fx.Node, Device], int]


def with_cuda_workspace(step: StepGraph, device: Device) -> StepGraph:
    """``step`` with the workspace of its ops on CUDA, as far as there is a rule."""
    nodes = step.nodes
    known: dict[str, int] = {}
    ops = list(step.ops)
    for index, op in enumerate(ops):
        rule = _rule_of(op.name)
        if rule is None:
            continue
        if op.signature not in known:
            known[op.signature] = rule(nodes[index], device)
        ops[index] = replace(op, workspace_bytes=known[op.signature])
    return replace(step, ops=tuple(ops))


def _rule_of(name: str) -> _Rule | None:
    return _RULES.get(name.removeprefix("aten.").partition(".")[0])


# -- reductions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reduction:
    """How a reduction's input is read."""

    outputs: int
    inputs: int
    """Elements that make one output."""
    inside: bool
    """Whether neighbours in memory are reduced with each other."""
    vector: int
    """Neighbouring outputs that a thread makes at once."""


def _of_reduction(node: fx.Node, device: Device) -> int:
    source = node.all_input_nodes[0].meta
    reduction = _reduction(source, _reduced_dims(node))
    accumulated = max(_FLOAT_BYTES, source["dtype"].itemsize)
    return _of_blocks(reduction, device, accumulated) if reduction else 0


def _reduced_dims(node: fx.Node) -> frozenset[int]:
    """The dimensions that an op reduces; none given are all."""
    position = 2 if "vector_norm" in str(node.target) else 1
    given: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    rank = len(node.all_input_nodes[0].meta["shape"])
    if isinstance(given, int):
        given = [given]
    return frozenset(d % rank for d in given) if given else frozenset(range(rank))


def _reduction(source: Mapping[str, Any], reduced: frozenset[int]) -> _Reduction | None:
    dims = [
        (stride, n, dim in reduced)
        for dim, (n, stride) in enumerate(zip(source["shape"], source["stride"], strict=True))
        if n != 1
    ]
    inputs = math.prod(n for _, n, is_reduced in dims if is_reduced)
    outputs = math.prod(n for _, n, is_reduced in dims if not is_reduced)
    if not outputs or inputs <= 1:
        return None
    nearest, row, inside = min(dims)
    vector = 1
    if not inside and nearest == 1:
        for stride, n, is_reduced in sorted(dims)[1:]:
            row *= n if stride == row and not is_reduced else 1
        others = [row, *(stride for stride, _, _ in dims if stride >= row)]
        vector = next(v for v in (4, 2, 1) if all(n % v == 0 for n in others))
    return _Reduction(outputs, inputs, inside, vector)


def _of_blocks(reduction: _Reduction, device: Device, accumulated_bytes: int) -> int:
    """``setReduceConfig`` of Reduce.cuh: an output that several blocks make needs their sums.

    Buffers have room for all threads of a block, which makes them up to 132 MiB.
    """
    threads = 512 // reduction.vector
    across = reduction.outputs // reduction.vector
    along = reduction.inputs
    wide, high = (along, across) if reduction.inside else (across, along)
    width, height = min(_power_of_two(wide, threads), 32), _power_of_two(high, threads)
    height = min(height, threads // width)
    width = min(_power_of_two(wide, threads), threads // height)
    along = -(-along // width) if reduction.inside else along
    blocks = -(-across // (1 if reduction.inside else width))
    if along < min(height * 16, 256):  # each warp makes an output of its own
        return 0
    along = -(-along // height)
    at_once = device.multiprocessors * (device.threads_per_multiprocessor // (width * height))
    if along < 256 or blocks > at_once:
        return 0
    split = max(min(-(-at_once // blocks), -(-along // 16)), -(-along // 256))
    if split <= 1:
        return 0
    size = accumulated_bytes * reduction.outputs * split
    if not reduction.inside:
        size *= width * reduction.vector
    parts = (size, _INT_BYTES * blocks)
    return sum(round_up(part, device.allocation_bytes) for part in parts)


def _power_of_two(number: int, most: int) -> int:
    return min(most, 1 << max(0, number.bit_length() - 1))


# -- attention -----------------------------------------------------------------------------------


def _of_cudnn_attention(node: fx.Node, device: Device) -> int:
    return _CUDNN_BYTES


def _of_flash_backward(node: fx.Node, device: Device) -> int:
    """``mha_bwd`` in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, read 2026-11.

    Its gradient of the queries adds up in float32. Where algorithms have to be deterministic, there
    are several such sums, as many as the device's processors ask for; one is counted.
    """
    gradient, query, key, _, out = (given.meta for given in _nodes(node.args[:5]))
    head = query["shape"][-1]
    rows = math.prod(query["shape"][:2]) * round_up(query["shape"][2], 128)
    floats: int = rows * (round_up(head, 32 if head <= 128 else 64) + 1)
    # The kernel's order of dimensions: rows before heads.
    copied = [meta for meta in (gradient, out) if not is_contiguous(_heads_last(meta))]
    halves = sum(_size(meta) for meta in copied)
    return floats * _FLOAT_BYTES + _expanded_keys(query, key) + halves


def _of_cudnn_backward(node: fx.Node, device: Device) -> int:
    """As flash attention's, without rounding the rows."""
    _, query, key, *_ = (given.meta for given in _nodes(node.args))
    floats: int = math.prod(query["shape"][:3]) * (query["shape"][-1] + 1)
    return floats * _FLOAT_BYTES + _expanded_keys(query, key) + _CUDNN_BYTES


def _expanded_keys(query: Mapping[str, Any], key: Mapping[str, Any]) -> int:
    """Keys of fewer heads get a gradient for each head of the queries first."""
    heads, head = query["shape"][1], query["shape"][-1]
    if key["shape"][1] == heads:
        return 0
    size: int = 2 * key["shape"][0] * heads * key["shape"][2] * head * query["dtype"].itemsize
    return size


def _heads_last(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {name: [meta[name][i] for i in (0, 2, 1, 3)] for name in ("shape", "stride")}


# -- others --------------------------------------------------------------------------------------


def _of_embedding(node: fx.Node, device: Device) -> int:
    """Indices that do not lie in one piece are copied."""
    indices = _nodes(node.args)[1].meta
    return 0 if is_contiguous(indices) else _size(indices)


def _of_embedding_backward(node: fx.Node, device: Device) -> int:
    """Indices are sorted; then every ten rows of an index are added up in float32, and those sums.

    Sums for the most that there could be are allocated (``embedding_backward_cuda_kernel``).
    """
    gradient, indices = (given.meta for given in _nodes(node.args)[:2])
    count = math.prod(indices["shape"])
    if count <= _FEW_INDICES:
        return 0
    rows = node.meta["shape"][0]
    segments = min(count, rows)
    parts = count // _ROWS_PER_THREAD + segments

    def rounded(size: int) -> int:
        return round_up(size, device.allocation_bytes)

    each = rounded(_LONG_BYTES * count)
    sums = rounded(parts * gradient["shape"][-1] * max(_FLOAT_BYTES, gradient["dtype"].itemsize))
    adding = 3 * each + 2 * rounded(_LONG_BYTES * segments) + rounded(_LONG_BYTES * parts)
    adding += sums + 2 * device.allocation_bytes
    copied = 0 if is_contiguous(gradient) else _size(gradient)
    return max(adding, 3 * each + _of_sorting(count)) + copied


def _of_sorting(count: int) -> int:
    return _SORT_PAIR_BYTES * count + _SORT_BYTES


def _of_index_put(node: fx.Node, device: Device) -> int:
    """Adding to indexed places sorts the indices; that is not exact."""
    accumulate = len(node.args) > 3 and node.args[3]
    indices = [i.meta for i in _nodes(node.args[1])]
    if not accumulate or not indices:
        return 0
    return _of_sorting(max(math.prod(meta["shape"]) for meta in indices))


def _of_softmax_backward(node: fx.Node, device: Device) -> int:
    """The gradient times the result is a tensor of its own (``softmax_backward_cuda_out``)."""
    gradient = _nodes(node.args)[0].meta
    return _size(gradient)


def _of_safe_softmax(node: fx.Node, device: Device) -> int:
    """A mask of what is -inf, whether all of a row is, and a scalar zero."""
    count, row = math.prod(node.meta["shape"]), node.meta["shape"][-1]
    parts = (count, count // max(1, row), node.meta["dtype"].itemsize)
    return sum(round_up(size, device.allocation_bytes) for size in parts)


def _of_scan(node: fx.Node, device: Device) -> int:
    return _size(node.meta)


def _of_convolution(node: fx.Node, device: Device) -> int:
    """Tensor cores read channels last, and so cuDNN copies what lies otherwise.

    What goes in, what comes out and the weight are copied, with their channels filled up.
    """
    source, weight = (given.meta for given in _nodes(node.args)[:2])
    if source["dtype"] not in _HALF:
        return 0
    return sum(map(_channels_last, (source, node.meta, weight))) + _CUDNN_BYTES


def _of_convolution_backward(node: fx.Node, device: Device) -> int:
    """As in the forward, with sums of parts of the weight's gradient.

    How many there are is cuDNN's affair: as many as in ViT's convolution of patches on an H100.
    """
    gradient, source, weight = (given.meta for given in _nodes(node.args)[:3])
    copied = 0 if is_contiguous(gradient) else _size(gradient)
    if source["dtype"] not in _HALF:
        return copied
    sums = 7 * _channels_last(weight) + _CUDNN_BYTES
    return copied + _channels_last(source) + _channels_last(gradient) + sums


def _channels_last(meta: Mapping[str, Any]) -> int:
    """Bytes of a copy with the channels last; 0 if they are, or if there are none."""
    shape = meta["shape"]
    if len(shape) < 3 or (len(shape) == 4 and meta["stride"][1] == 1 != shape[1]):
        return 0
    count = shape[0] * round_up(shape[1], _CHANNELS) * math.prod(shape[2:])
    size: int = count * meta["dtype"].itemsize
    return size


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "linalg_vector_norm"), _of_reduction),
    "_scaled_dot_product_cudnn_attention": _of_cudnn_attention,
    "_scaled_dot_product_cudnn_attention_backward": _of_cudnn_backward,
    "_scaled_dot_product_flash_attention_backward": _of_flash_backward,
    "embedding": _of_embedding,
    "embedding_dense_backward": _of_embedding_backward,
    "index_put": _of_index_put,
    "index_put_": _of_index_put,
    "_index_put_impl_": _of_index_put,
    "_softmax_backward_data": _of_softmax_backward,
    "_safe_softmax": _of_safe_softmax,
    "cumsum": _of_scan,
    "convolution": _of_convolution,
    "convolution_backward": _of_convolution_backward,
}


def _nodes(value: Any) -> list[fx.Node]:
    """The tensors among arguments, in order."""
    found = []
    for item in value:
        if isinstance(item, fx.Node):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            found += _nodes(item)
    return found


def _size(meta: Mapping[str, Any]) -> int:
    size: int = math.prod(meta["shape"]) * meta["dtype"].itemsize
    return size
