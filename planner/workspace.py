"""Memory that a kernel allocates inside an op and frees before it returns.

A step on fake tensors cannot see it. Where a rule is known it is a formula. On a CPU matrix
products in half precision and convolutions pack their operands as the library and the processor
like it, and some kernels are made of others: these are run once, on made-up tensors, in a process
of their own that reads the allocator's events. Results are remembered by op, shapes and strides.
Depends on the step's records and torch.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from memfit.planner.errors import MemfitError
from memfit.planner.measuring import made_up
from memfit.planner.step_graph import NUMBER_BYTES, Kind, StepGraph, Storage

_MATMULS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten._grouped_mm.")
_MEASURED_OPS = (
    "aten.convolution",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten.native_batch_norm",
    "aten.native_group_norm",
    "aten.mkldnn_rnn_layer.",
    "aten.repeat.",
    "aten.upsample_",
    "aten.logsumexp.",
    "aten.binary_cross_entropy",
    "aten.mse_loss.",
    "aten.smooth_l1_loss.",
    "aten.soft_margin_loss.",
    "aten.grid_sampler",
    "aten._cdist",
    "aten._fft",
)
# Measured where what goes in is not contiguous.
_MEASURED_IF_STRIDED = (
    "aten.gelu",
    "aten.avg_pool",
    "aten._adaptive_avg_pool",
    "aten.max_pool",
    "aten.reflection_pad",
    "aten.replication_pad",
    "aten.im2col",
    "aten.bucketize",
)
# Make contiguous copies of what is not.
_COPYING = (
    "aten._softmax",
    "aten._log_softmax",
    "aten.native_layer_norm.",
    "aten.nll_loss_forward.",
    "aten.nll_loss2d_forward.",
    "aten.embedding_dense_backward.",
)
_HALF = (torch.bfloat16, torch.float16)
_WITH_NUMBERS = frozenset(
    f"aten.{name}"
    for name in (
        "mul.Tensor",
        "div.Tensor",
        "add.Tensor",
        "sub.Tensor",
        "rsub.Scalar",
        "mul_.Tensor",
        "div_.Tensor",
        "add_.Tensor",
        "sub_.Tensor",
    )
)
_TRANSPOSED_BLOCK = 60
# Elements from which kernels use several threads (``at::internal::GRAIN_SIZE``).
_GRAIN = 32768


@dataclass(frozen=True, slots=True)
class TensorLike:
    """Stands for a tensor argument in a request to the measuring process."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Request:
    """An op to run once."""

    op: str
    args: Any
    kwargs: Any


@dataclass(frozen=True, slots=True)
class Allocated:
    """What an op allocates."""

    results_bytes: int
    workspace_bytes: int


# By op, shapes, strides and threads, for as long as the process lives.
_MEASURED: dict[object, Allocated] = {}


class WorkspaceError(MemfitError, RuntimeError):
    """The measuring process failed."""


def with_cpu_workspace(step: StepGraph) -> StepGraph:
    """``step`` with the workspace of its ops on this machine's CPU."""
    nodes = step.nodes
    keys = {index: _key(nodes[index]) for index in nodes if _is_measured(nodes[index])}
    missing = {key: nodes[index] for index, key in keys.items() if key not in _MEASURED}
    if missing:
        requests = [
            Request(str(n.target), _plain(n.args), _plain(n.kwargs)) for n in missing.values()
        ]
        _MEASURED.update(zip(missing, _measure(requests), strict=True))
    # Numbers that autograd saves are storages of the step.
    saved = {s.born for s in step.storages if s.kind is Kind.NUMBER}
    ops = tuple(
        replace(
            op,
            workspace_bytes=_MEASURED[keys[i]].workspace_bytes
            if i in keys
            else max(0, _by_rule(nodes[i]) - (NUMBER_BYTES if i in saved else 0)),
        )
        for i, op in enumerate(step.ops)
    )
    made = {i: _MEASURED[key].results_bytes for i, key in keys.items()}
    return replace(step, ops=ops, storages=_with_true_results(step, made))


def _with_true_results(step: StepGraph, made_bytes: Mapping[int, int]) -> tuple[Storage, ...]:
    """Storages of ``step``, those of ops that keep more than their results show with all of it.

    Fake results do not have oneDNN's memory for the backward of a recurrent layer, nor what
    reductions of a loss leave in the storage of their scalar. ``made_bytes`` is by op.
    """
    storages = list(step.storages)
    for op, size in made_bytes.items():
        made = [i for i in step.ops[op].outputs if storages[i].born == op]
        unseen = size - sum(storages[i].size_bytes for i in set(made))
        if made and unseen > 0:
            last = storages[made[-1]]
            storages[made[-1]] = replace(last, size_bytes=last.size_bytes + unseen)
    return tuple(storages)


def _is_measured(node: fx.Node) -> bool:
    name = str(node.target)
    if name.startswith(_MEASURED_OPS):
        return True
    given = [n.meta for n in node.all_input_nodes]
    if name.startswith(_MEASURED_IF_STRIDED):
        return not all(map(is_contiguous, given))
    return name.startswith(_MATMULS) and (
        node.meta["dtype"] in _HALF or not all(map(_is_matrix, given))
    )


def _by_rule(node: fx.Node) -> int:
    name, tensors = str(node.target), [n.meta for n in node.all_input_nodes]
    if name.startswith("aten._safe_softmax"):
        # A mask of what is -inf, whether all of a row is, and a scalar zero.
        count, row = torch.Size(node.meta["shape"]).numel(), node.meta["shape"][-1]
        return int(count + count // max(1, row) + node.meta["dtype"].itemsize)
    if name.startswith("aten.native_layer_norm_backward"):
        return _of_layer_norm_backward(node.args)
    if name.startswith("aten.masked_select"):
        return _of_masked_select(node)
    if name == "aten.index.Tensor":
        return _of_masked_index(node)
    if name.startswith(_COPYING):
        return sum(_size(t, t["dtype"]) for t in tensors if not is_contiguous(t))
    if name in ("aten.copy_.default", "aten.clone.default"):
        return _of_transposing(node.meta, tensors[-1])
    if name in _WITH_NUMBERS and len(tensors) == 1:
        return _of_number(node)
    if name.startswith("aten.mean."):  # a sum, divided in place
        return int(NUMBER_BYTES + node.meta["dtype"].itemsize)
    if name.startswith("aten._foreach_") and any(type(a) in (int, float) for a in node.args):
        return NUMBER_BYTES  # tensor by tensor, as if there were no such op
    if len(tensors) == 2 and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
        # Operands of other dtypes are converted whole before the loop.
        common = torch.promote_types(tensors[0]["dtype"], tensors[1]["dtype"])
        if common.is_floating_point:
            return sum(_size(t, common) for t in tensors if t["shape"] and t["dtype"] != common)
    return 0


def _of_layer_norm_backward(args: Any) -> int:
    gradient, source, shape, *_, wanted = args
    copied = [node.meta for node in (gradient, source) if not is_contiguous(node.meta)]
    # What each thread sums up for the gradients of weight and bias.
    sums = 2 * _threads() * torch.Size(shape).numel() * source.meta["dtype"].itemsize
    return sum(_size(meta, meta["dtype"]) for meta in copied) + (sums if any(wanted[1:]) else 0)


def _of_transposing(made: dict[str, Any], source: dict[str, Any]) -> int:
    """A large transposed matrix is copied through a buffer (``copy_transpose_valid``)."""
    shape, stride = source["shape"], source["stride"]
    transposed = len(shape) == 2 and stride == (1, shape[0]) and is_contiguous(made)
    if not transposed or made["dtype"] != source["dtype"]:
        return 0
    block = _TRANSPOSED_BLOCK**2
    return int(block * made["dtype"].itemsize) if torch.Size(shape).numel() >= block else 0


def _of_number(node: fx.Node) -> int:
    """A Python number becomes a tensor, and another one in the dtype that is worked in."""
    number = next((a for a in node.args if isinstance(a, (int, float))), None)
    if number is None:  # a tensor with itself
        return 0
    worked_in = node.meta["dtype"]
    own = torch.float64 if isinstance(number, float) else torch.int64
    return NUMBER_BYTES + (worked_in.itemsize if worked_in is not own else 0)


def _of_masked_select(node: fx.Node) -> int:
    """The mask as whole numbers, to count it, and again with its running sum to find places."""
    source, mask = (n.meta for n in node.all_input_nodes)
    shape: torch.Size = torch.broadcast_shapes(source["shape"], mask["shape"])  # type: ignore[no-untyped-call]
    count = shape.numel()
    plain = source["shape"] == mask["shape"] and is_contiguous(source) and is_contiguous(mask)
    if plain and (count < _GRAIN or _threads() == 1):
        return max(0, 8 * count + 8 - _size(node.meta, node.meta["dtype"]))
    return 16 * count


def _of_masked_index(node: fx.Node) -> int:
    """The places where masks are set, a whole number for each of their dimensions."""
    indices = node.args[1]
    assert isinstance(indices, (tuple, list))
    masks = [i.meta for i in indices if isinstance(i, fx.Node) and i.meta["dtype"] is torch.bool]
    source = node.all_input_nodes[0].meta["shape"]
    dims = sum(len(mask["shape"]) for mask in masks)
    rest = max(1, torch.Size(source[dims:]).numel())
    return 8 * dims * (torch.Size(node.meta["shape"]).numel() // rest)


def _size(meta: dict[str, Any], dtype: torch.dtype) -> int:
    return torch.Size(meta["shape"]).numel() * dtype.itemsize


def is_contiguous(meta: Mapping[str, Any]) -> bool:
    """Whether a tensor of this shape and stride lies in one piece, in order."""
    expected = 1
    for size, stride in zip(reversed(meta["shape"]), reversed(meta["stride"]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _is_matrix(meta: dict[str, Any]) -> bool:
    """Whether a product can read it as it lies: with rows or columns in one piece."""
    if len(meta["shape"]) < 2:
        return True
    rows, columns = meta["shape"][-2:]
    down, across = meta["stride"][-2:]
    in_rows = (across == 1 or columns == 1) and (down >= columns or rows == 1)
    in_columns = (down == 1 or rows == 1) and (across >= rows or columns == 1)
    return bool(in_rows or in_columns)


def _key(node: fx.Node) -> object:
    return str(node.target), repr(_plain(node.args)), repr(_plain(node.kwargs)), _threads()


def _threads() -> int:
    return torch.get_num_threads()


def _plain(value: Any) -> Any:
    """``value`` with a description in place of every node."""
    if isinstance(value, fx.Node):
        return TensorLike(value.meta["shape"], value.meta["stride"], value.meta["dtype"])
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return value


def _measure(requests: Sequence[Request]) -> list[Allocated]:
    """Runs the requests in a fresh process: a profiler session must not touch the caller's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "memfit.planner.workspace"],
        input=pickle.dumps((_threads(), list(requests))),
        capture_output=True,
        env=environment,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise WorkspaceError(
            "the process that measures the memory of CPU kernels failed: "
            f"{lines[-1] if lines else f'exit status {done.returncode}'}"
        )
    sizes: list[Allocated] = pickle.loads(done.stdout)
    return sizes


def _run(request: Request) -> Allocated:
    """What an op allocates, by the allocator's events."""
    from torch.profiler import ProfilerActivity, profile

    function: Any = torch.ops.aten
    for name in request.op.split(".")[1:]:
        function = getattr(function, name)
    args, kwargs = _tensors(request.args), _tensors(request.kwargs)
    function(*args, **kwargs)  # what is allocated once and for all is not workspace
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function(*args, **kwargs)
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    alive = most = 0
    for _, size in events:
        alive += size
        most = max(most, alive)
    del result
    return Allocated(alive, most - alive)


def _tensors(value: Any) -> Any:
    if isinstance(value, TensorLike):
        return made_up(value.shape, value.stride, value.dtype, torch.device("cpu"))
    if isinstance(value, tuple):
        return [_tensors(v) for v in value]
    if isinstance(value, dict):
        return {key: _tensors(v) for key, v in value.items()}
    return value


def _serve() -> None:
    answer = os.dup(1)
    os.dup2(2, 1)  # the profiler talks on stdout
    threads, requests = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    # Gradients are recorded, else recurrent kernels keep nothing for their backward.
    with os.fdopen(answer, "wb") as out:
        out.write(pickle.dumps([_run(request) for request in requests]))


if __name__ == "__main__":
    # Under its own name, since requests are pickled with the module that made them.
    from memfit.planner import workspace

    workspace._serve()
