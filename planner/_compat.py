"""Private or surprising parts of the libraries that the planner stands on, one shim each.

Every shim names what has to change upstream before it can go. Depends on torch; transformers is
only looked at when something else has imported it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "autocast_off",
    "fake_tensors_look_real",
    "flops_of",
    "forward_autocast",
    "function_caches_apart",
    "is_own_output",
    "is_wrapped",
    "new_fake",
    "real_execution",
    "run_fake",
    "storage_key",
]

# FakeTensorMode has no public name yet (torch._subclasses); neither have its errors.
DATA_DEPENDENT_ERRORS = (DataDependentOutputException, DynamicOutputShapeException)


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the tensor's storage while it lives.

    ``untyped_storage().data_ptr()`` is 0 for every fake tensor; goes when storages hash by
    identity.
    """
    return cast(int, tensor.untyped_storage()._cdata)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of ``torch.func`` (vmap, grad) wraps the tensor: it has no storage then.

    Goes when ``torch.func`` has a name for it (``torch._C._functorch`` is private).
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_own_output(tensor: torch.Tensor) -> bool:
    """In a pack hook: whether the node that saves ``tensor`` may be the one that made it.

    Such a tensor refers to the node. If another node saves it, that one is the younger of the two.
    Goes when pack hooks are told (``SavedVariable`` knows); sequence numbers have no public name,
    ``torch.fx.proxy`` reads them in the same way.
    """
    node = tensor.grad_fn
    if node is None:
        return False
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return True  # its forward may have made younger nodes
    now = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return bool(node._sequence_nr() + 1 == now)


def new_fake(mode: FakeTensorMode, like: torch.Tensor, device: torch.device) -> FakeTensor:
    """A fake tensor on ``device`` with ``like``'s shape, strides and dtype, and its own storage."""
    with mode:
        fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return cast(FakeTensor, fake)


@contextmanager
def real_execution() -> Iterator[None]:
    """Runs torch ops for real inside a dispatch mode under FakeTensorMode.

    Goes when torch offers a public way to leave all modes (``_disable_current_modes`` is private).
    """
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad():
        yield


@contextmanager
def fake_tensors_look_real() -> Iterator[None]:
    """Keeps transformers from treating fake tensors as a tracer's.

    ``transformers.utils.import_utils.is_tracing`` answers True for a FakeTensor; masks that eager
    execution drops are then built, and attention takes another kernel. Goes when transformers
    tells tracing from running on fake tensors.
    """
    imported = sys.modules.get("transformers.utils.import_utils")
    if imported is None:
        yield
        return
    with mock.patch.object(imported, "is_fake_tensor", lambda _: False):
        yield


@contextmanager
def function_caches_apart(model: nn.Module, adopt: Callable[[Any], Any]) -> Iterator[None]:
    """Runs the cached functions of transformers as if their caches, left alone, were warm.

    ``compile_compatible_method_lru_cache`` steps aside only while dynamo compiles; a cached fake
    tensor would turn up in the real model. But a step after the first finds its tensors in the
    cache, where they are part of no region. So they are made for real, once, and ``adopt`` turns
    them into fakes. Goes when the cache can be looked into.
    """
    imported = sys.modules.get("transformers.pytorch_utils")
    if imported is None:
        yield
        return
    with ExitStack() as stack:
        for cell in _cached_functions(model, imported):
            stack.callback(setattr, cell, "cell_contents", cell.cell_contents)
            cell.cell_contents = _warm(cell.cell_contents, adopt)
        stack.enter_context(mock.patch.object(imported, "is_torchdynamo_compiling", lambda: True))
        yield


def _cached_functions(model: nn.Module, imported: Any) -> list[Any]:
    """The cells that hold the functions behind the caches, in the modules that define ``model``."""
    code = imported.compile_compatible_method_lru_cache()(abs).__code__
    names = {kind.__module__ for m in model.modules() for kind in type(m).__mro__}
    found = []
    for name in sorted(names & sys.modules.keys()):
        values = list(vars(sys.modules[name]).values())
        values += [v for kind in values if isinstance(kind, type) for v in vars(kind).values()]
        functions = {id(f): f for f in (getattr(v, "__func__", v) for v in values)}.values()
        cached = [f for f in functions if getattr(f, "__code__", None) is code]
        found += [f.__closure__[code.co_freevars.index("func")] for f in cached]
    return found


def _warm(function: Callable[..., Any], adopt: Callable[[Any], Any]) -> Callable[..., Any]:
    known: dict[object, Any] = {}

    def warm(*args: Any, **kwargs: Any) -> Any:
        # Tensors and modules are fakes here, and the cache knows them by identity.
        if any(isinstance(a, (torch.Tensor, nn.Module)) for a in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        key = args, tuple(kwargs.items())
        if key not in known:
            with real_execution():
                known[key] = adopt(function(*args, **kwargs))
        return known[key]

    return warm


@contextmanager
def autocast_off() -> Iterator[None]:
    """Leaves the caller's autocast."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def forward_autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast`` that forgets its casts at its end, if there is a dtype.

    The cache of casts is one for the whole thread and is emptied only when the outermost autocast
    ends, which may be the caller's; goes when each context has its own.
    """
    if dtype is None:
        yield
        return
    with torch.autocast(device_type, dtype):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def run_fake(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on fake tensors.

    The meta kernel of ``_grouped_mm`` refuses all but bfloat16, which eager CPU does not; goes when
    it takes what the kernels take.
    """
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
        halves = (args[0].bfloat16(), args[1].bfloat16(), *args[2:])
        return func(*halves, **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating point operations of one aten op by torch's own formulas; 0 for those without one.

    Adds CPU flash attention and grouped products, which ``torch.utils.flop_counter`` lacks in 2.13.
    """
    packet = func.overloadpacket
    if packet is torch.ops.aten._grouped_mm:
        # The rows, the columns or the summands of one product are split among the groups.
        rows, columns = args[0].shape, args[1].shape
        grouped_inside = len(rows) == len(columns) == 3
        return int(2 * (rows[0] if grouped_inside else 1) * rows[-2] * rows[-1] * columns[-1])
    if packet is _CPU_ATTENTION:
        return int(
            sdpa_flop_count(  # type: ignore[no-untyped-call]
                *(a.shape for a in args[:3])
            )
        )
    if packet is _CPU_ATTENTION_BACKWARD:
        return int(
            sdpa_backward_flop_count(  # type: ignore[no-untyped-call]
                *(a.shape for a in args[:4])
            )
        )
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
