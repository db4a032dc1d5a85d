"""Times every distinct op of a captured step on the device itself.

One op of each signature runs on made-up tensors of its shapes and strides, alone, so at most one
op's tensors are allocated at a time; equal ops get equal seconds, for as long as the process runs.
Ops that must not run on made-up numbers are left to the roofline. Depends on the step's records
and torch.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memfit.planner.costs import SAMPLE
from memfit.planner.shadows import tensors_in
from memfit.planner.step_graph import SAMPLE_ELEMENTS, StepGraph

# An op runs so often, or until it has taken so long; the first run of a short one warms up.
_RUNS = 4
_ENOUGH_SECONDS = 0.1
# In a step, what an op reads has mostly left a CPU's caches; so it has here, when it is of this
# size, after so much other memory was written to.
_COLD_BYTES, _CACHE_BYTES = 2**16, 2**26
# By device and threads, then by signature: a plan that is made again is the same plan, and of two
# budgets the larger never looks slower. None for an op that cannot run alone.
_KNOWN: dict[tuple[str, int], dict[str, float | None]] = defaultdict(dict)


def measured_seconds(step: StepGraph, device: torch.device) -> dict[str, float]:
    """Seconds by op signature; an op that cannot run alone is left out.

    The fastest of a few runs counts: what else the machine does only ever adds.
    """
    known = _KNOWN[str(device), torch.get_num_threads()]
    nodes = step.nodes
    other = torch.zeros(_CACHE_BYTES, dtype=torch.uint8) if device.type == "cpu" else None
    with torch.random.fork_rng(), torch.no_grad():
        for index, op in enumerate(step.ops):
            if op.signature not in known and (op.flops or op.moved_bytes):
                known[op.signature] = _time_node(nodes[index], device, other)
        if SAMPLE not in known:
            tensor = torch.zeros(_COLD_BYTES, device=device)
            known[SAMPLE] = _time(lambda: _sample_twice(tensor), device, other)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    signatures = {SAMPLE, *(op.signature for op in step.ops)}
    found = ((signature, known.get(signature)) for signature in signatures)
    return {signature: seconds for signature, seconds in found if seconds is not None}


def _sample_twice(tensor: torch.Tensor) -> None:
    """What a probe does in a forward and in its backward."""
    line = (SAMPLE_ELEMENTS,), (tensor.numel() // SAMPLE_ELEMENTS,)
    sample, again = (tensor.as_strided(*line).clone() for _ in range(2))
    (again.view(torch.uint8) != sample.view(torch.uint8)).any()


def _time_node(node: fx.Node, device: torch.device, other: torch.Tensor | None) -> float | None:
    function: Any = node.target
    if _needs_true_values(function):
        return None
    try:
        args, kwargs = _real((node.args, node.kwargs), device)
        is_cold = sum(t.nbytes for t in tensors_in((args, kwargs))) >= _COLD_BYTES
        return _time(lambda: function(*args, **kwargs), device, other if is_cold else None)
    except (RuntimeError, TypeError, IndexError, ValueError):
        # An op whose arguments cannot be made up (indices into a table, a generator): the caller
        # prices it by the roofline and says so.
        return None


def _time(run: Callable[[], object], device: torch.device, other: torch.Tensor | None) -> float:
    clock = _on_cuda if device.type == "cuda" else _on_cpu
    taken: list[float] = []
    while len(taken) < _RUNS and sum(taken) < _ENOUGH_SECONDS:
        if other is not None:
            other.add_(1)
        taken.append(clock(run))
    return min(taken)


def _needs_true_values(function: Any) -> bool:
    """Whether an op takes memory that only its forward can fill, or how much it has to do.

    Made up, the first crashes the process (mkldnn_rnn_layer_backward), the second means no work.
    Of ops that are not torch's own, nobody knows.
    """
    names = (argument.name.lower() for argument in function._schema.arguments)
    return (
        function.namespace != "aten"
        or function.overloadpacket is torch.ops.aten._grouped_mm
        or any(name.startswith(("workspace", "reserve")) for name in names)
    )


def _on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_cuda(run: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _real(value: Any, device: torch.device) -> Any:
    """``value`` with a random tensor in place of every node."""
    if isinstance(value, fx.Node):
        return _tensor(value, device)
    if isinstance(value, torch.device):
        return device
    if isinstance(value, (tuple, list)):
        return type(value)(_real(v, device) for v in value)
    if isinstance(value, dict):
        return {key: _real(v, device) for key, v in value.items()}
    return value


def _tensor(node: fx.Node, device: torch.device) -> torch.Tensor:
    return made_up(node.meta["shape"], node.meta["stride"], node.meta["dtype"], device)


def made_up(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of fractions (zeros for integers), of overlapping strides too.

    Random on a GPU, where equal numbers take less power and so less time; on a CPU it would take
    longer to draw them than to run the op.
    """
    elements = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    flat = torch.zeros(elements if 0 not in shape else 0, dtype=dtype, device=device)
    if dtype.is_floating_point:
        flat.uniform_() if device.type == "cuda" else flat.fill_(0.5)
    return flat.as_strided(shape, stride)
