"""Memory that a CPU kernel allocates inside an op and frees before it returns.

A step on fake tensors cannot see it. Where a rule is known it is a formula; matrix products in half
precision and convolutions pack their operands as the library and the processor like it, so these
are run once, on random tensors, in a process of their own that reads the allocator's events.
Results are remembered by op, shapes and strides. Depends on the step's records and torch.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from memfit.planner.errors import MemfitError
from memfit.planner.measuring import made_up
from memfit.planner.step_graph import StepGraph

_MATMULS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten._grouped_mm.")
_PACKING = ("aten.convolution", "aten._scaled_dot_product_flash_attention_for_cpu")
_HALF = (torch.bfloat16, torch.float16)
# Bytes by op, shapes, strides and threads, for as long as the process lives.
_MEASURED: dict[object, int] = {}


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


class WorkspaceError(MemfitError, RuntimeError):
    """The measuring process failed."""


def with_cpu_workspace(step: StepGraph) -> StepGraph:
    """``step`` with the workspace of its ops on this machine's CPU."""
    nodes = step.nodes()
    keys = {index: _key(nodes[index]) for index in nodes if _is_measured(nodes[index])}
    missing = {key: nodes[index] for index, key in keys.items() if key not in _MEASURED}
    if missing:
        requests = [
            Request(str(n.target), _plain(n.args), _plain(n.kwargs)) for n in missing.values()
        ]
        _MEASURED.update(zip(missing, _measure(requests), strict=True))
    ops = tuple(
        replace(op, workspace_bytes=_MEASURED[keys[i]] if i in keys else _by_rule(nodes[i]))
        for i, op in enumerate(step.ops)
    )
    return replace(step, ops=ops)


def _is_measured(node: fx.Node) -> bool:
    name = str(node.target)
    if name.startswith(_PACKING):
        return True
    return name.startswith(_MATMULS) and node.meta["dtype"] in _HALF


def _by_rule(node: fx.Node) -> int:
    name, tensors = str(node.target), [n.meta for n in node.all_input_nodes]
    if name.startswith("aten._safe_softmax"):
        # A mask of what is -inf, whether all of a row is, and a scalar zero.
        count, row = torch.Size(node.meta["shape"]).numel(), node.meta["shape"][-1]
        return int(count + count // max(1, row) + node.meta["dtype"].itemsize)
    if name.startswith("aten.native_layer_norm_backward"):
        return _of_layer_norm_backward(node.args)
    if name.startswith("aten.embedding_dense_backward"):
        return 0 if _is_contiguous(tensors[0]) else _size(tensors[0], tensors[0]["dtype"])
    if len(tensors) == 2 and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
        # Operands of other dtypes are converted whole before the loop.
        common = torch.promote_types(tensors[0]["dtype"], tensors[1]["dtype"])
        if common.is_floating_point:
            return sum(_size(t, common) for t in tensors if t["shape"] and t["dtype"] != common)
    return 0


def _of_layer_norm_backward(args: Any) -> int:
    gradient, source, shape, *_, wanted = args
    copied = [node.meta for node in (gradient, source) if not _is_contiguous(node.meta)]
    # What each thread sums up for the gradients of weight and bias.
    sums = 2 * _threads() * torch.Size(shape).numel() * source.meta["dtype"].itemsize
    return sum(_size(meta, meta["dtype"]) for meta in copied) + (sums if any(wanted[1:]) else 0)


def _size(meta: dict[str, Any], dtype: torch.dtype) -> int:
    return torch.Size(meta["shape"]).numel() * dtype.itemsize


def _is_contiguous(meta: dict[str, Any]) -> bool:
    expected = 1
    for size, stride in zip(reversed(meta["shape"]), reversed(meta["stride"]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


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


def _measure(requests: Sequence[Request]) -> list[int]:
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
    sizes: list[int] = pickle.loads(done.stdout)
    return sizes


def _run(request: Request) -> int:
    """Bytes that an op allocates at most beyond its results, by the allocator's events."""
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
    return most - alive


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
    with torch.no_grad(), os.fdopen(answer, "wb") as out:
        out.write(pickle.dumps([_run(request) for request in requests]))


if __name__ == "__main__":
    # Under its own name, since requests are pickled with the module that made them.
    from memfit.planner import workspace

    workspace._serve()
