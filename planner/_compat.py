"""Private or surprising parts of the libraries that the planner stands on, one shim each.

Every shim names what has to change upstream before it can go. Depends on torch; transformers is
only looked at when something else has imported it.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, lru_cache
from types import CodeType
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
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "IN_PLACE_IN_BACKWARD",
    "CacheTooSmall",
    "FakeOps",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "another_fake",
    "autocast_off",
    "collects_outputs",
    "cuda_autocast_on_cpu",
    "device_asked",
    "fake_tensors_look_real",
    "forward_autocast",
    "function_caches_apart",
    "is_own_output",
    "is_wrapped",
    "make_parameter",
    "modules_stay_where_they_are",
    "new_fake",
    "ops_with_autocast",
    "other_kernels",
    "reading_values",
    "real_execution",
    "run_fake",
    "storage_key",
    "uncompiled",
    "without_compiler",
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
    """A fake tensor on ``device`` with ``like``'s shape, strides and dtype, and its own storage.

    Goes when ``torch.empty_strided`` in the mode, which takes six times as long, is as fast.
    """
    with no_dispatch():
        meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        return FakeTensor(mode, meta, device)


def device_asked(func: Any, args: tuple[Any, ...]) -> torch.device | None:
    """What ``tensor.device`` asks all modes, if that is what a dispatch mode is asked.

    Goes when fake tensors answer it themselves: autograd asks for every gradient, the optimizer's
    step for every tensor.
    """
    if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
        return args[0].fake_device
    return None


def make_parameter(fake: FakeTensor, requires_grad: bool) -> None:
    """Makes ``fake`` a parameter.

    Goes when ``nn.Parameter``, which detaches what it is given, is fast for fake tensors.
    """
    fake._is_param = True
    fake.requires_grad_(requires_grad)


def another_fake(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor like ``tensor``, which is one, with its own storage."""
    fake = cast(FakeTensor, tensor)
    return new_fake(fake.fake_mode, fake, fake.fake_device)


@contextmanager
def real_execution() -> Iterator[None]:
    """Runs torch ops for real inside a dispatch mode under FakeTensorMode.

    Goes when torch offers a public way to leave all modes (``_disable_current_modes`` is private).
    """
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad():
        yield


@contextmanager
def reading_values() -> Iterator[None]:
    """:func:`real_execution` inside of a function mode, which must not see what is read.

    Goes with the public way to leave all modes (``DisableTorchFunction`` is private, too).
    """
    with real_execution(), torch._C.DisableTorchFunction():
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


def collects_outputs() -> bool:
    """Whether a model of transformers is being asked for its layers' outputs.

    Its hooks on the layers stay once they are there, and ask the same variable whether to work.
    Goes when ``transformers.utils.output_capturing`` has a public question for it.
    """
    imported = sys.modules.get("transformers.utils.output_capturing")
    return imported is not None and bool(imported._active_collector.get())


@contextmanager
def modules_stay_where_they_are() -> Iterator[None]:
    """Lets ``module.to()`` do nothing where nothing moves.

    ``nn.Module._apply`` swaps parameters that are fake tensors even with themselves, and fails on
    those that something refers to weakly. Goes when it leaves equal ones alone.
    """
    apply: Callable[..., nn.Module] = nn.Module._apply

    def unless_same(module: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        tensors = [*module.parameters(recurse), *module.buffers(recurse)]
        if all(fn(tensor) is tensor for tensor in tensors):
            return module
        return apply(module, fn, recurse)

    with mock.patch.object(nn.Module, "_apply", unless_same):
        yield


class CacheTooSmall(RuntimeError):
    """A step calls a cached function with more arguments than its cache holds."""


@contextmanager
def function_caches_apart(
    model: nn.Module, adopt: Callable[[Any], Any], too_small: set[Callable[..., Any]]
) -> Iterator[None]:
    """Runs the cached functions of transformers as if their caches, left alone, were warm.

    ``compile_compatible_method_lru_cache`` steps aside only while dynamo compiles; a cached fake
    tensor would turn up in the real model. But a step after the first finds its tensors in the
    cache, where they are part of no region. So they are made for real, once, and ``adopt`` turns
    them into fakes. A cache that is too small for a step (SAM 2) misses in every one, and holds the
    last results: its function is added to ``too_small`` and :class:`CacheTooSmall` raised; of those
    that are in it, calls are part of the step. Goes when the cache can be looked into.
    """
    imported = sys.modules.get("transformers.pytorch_utils")
    if imported is None:
        yield
        return
    with ExitStack() as stack:
        for cell, size in _cached_functions(model, imported):
            function = cell.cell_contents
            stack.callback(setattr, cell, "cell_contents", function)
            small = function in too_small
            cell.cell_contents = (
                lru_cache(size)(function) if small else _warm(function, size, adopt, too_small)
            )
        stack.enter_context(mock.patch.object(imported, "is_torchdynamo_compiling", lambda: True))
        yield


def _cached_functions(model: nn.Module, imported: Any) -> list[tuple[Any, int | None]]:
    """The cells that hold the functions behind the caches, in the modules that define ``model``.

    With each, how many results its cache holds.
    """
    code: CodeType = imported.compile_compatible_method_lru_cache()(abs).__code__
    names = {kind.__module__ for m in model.modules() for kind in type(m).__mro__}
    found = []
    for name in sorted(names & sys.modules.keys()):
        values = list(vars(sys.modules[name]).values())
        values += [v for kind in values if isinstance(kind, type) for v in vars(kind).values()]
        unwrapped: list[Any] = [getattr(v, "__func__", v) for v in values]
        functions = {id(f): f for f in unwrapped}.values()
        for function in functions:
            if getattr(function, "__code__", None) is code:
                cells = dict(zip(code.co_freevars, function.__closure__, strict=True))
                cached = cells["func_with_cache"].cell_contents
                found.append((cells["func"], cached.cache_parameters()["maxsize"]))
    return found


def _warm(
    function: Callable[..., Any],
    size: int | None,
    adopt: Callable[[Any], Any],
    too_small: set[Callable[..., Any]],
) -> Callable[..., Any]:
    """``function``, results made beforehand unless of tensors; ``size`` is what its cache holds."""
    known: dict[object, Any] = {}
    own = lru_cache(size)(function)

    def warm(*args: Any, **kwargs: Any) -> Any:
        # Tensors and modules are fakes here, and the cache knows them by identity.
        if any(isinstance(a, (torch.Tensor, nn.Module)) for a in (*args, *kwargs.values())):
            return own(*args, **kwargs)
        key = args, tuple(kwargs.items())
        if key not in known:
            with real_execution():
                known[key] = adopt(function(*args, **kwargs))
            if size is not None and len(known) > size:
                too_small.add(function)
                raise CacheTooSmall(f"{function.__qualname__} is called with {len(known)} keys")
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


@cache
def ops_with_autocast(device: str) -> frozenset[str]:
    """Names such as ``softmax.int`` of the aten ops that the autocast of a device does not pass on.

    ``device`` is ``"CPU"`` or ``"CUDA"``, which builds without CUDA know too. Goes when the lists
    of ``torch/include/ATen/autocast_mode.h`` can be read from Python.
    """
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(n.removeprefix("aten::") for n in names if has_kernel(n, f"Autocast{device}"))


@contextmanager
def other_kernels(key: str, kernels: Mapping[str, Callable[..., Any] | None]) -> Iterator[None]:
    """Kernels for aten ops at the dispatch key ``key``, for a while; None passes an op on.

    Goes when a library can be closed (``Library._destroy``, which brings back the kernels that were
    there before, is private), or fake CUDA tensors work without CUDA.
    """
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            # Once in a process torch says that kernels are overridden.
            warnings.simplefilter("ignore")
            for name, kernel in kernels.items():
                library.impl(name, kernel or torch.library.fallthrough_kernel, key)
        yield
    finally:
        library._destroy()


@contextmanager
def cuda_autocast_on_cpu(forget: Callable[[], None]) -> Iterator[None]:
    """``torch.autocast("cuda")``, and what asks for its state, is the CPU's for a while.

    A model that runs on CPU tensors in place of CUDA's may name the device that it is meant for.
    ``forget`` is called when autocast forgets the casts that it keeps. Goes when fake CUDA tensors
    work without CUDA.
    """
    make, forget_casts = torch.autocast.__init__, torch.clear_autocast_cache
    is_enabled, get_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def meant(device: str) -> str:
        return "cpu" if device == "cuda" else device

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(self, meant(device_type), *args, **kwargs)

    def forget_all() -> None:
        forget_casts()
        forget()

    with ExitStack() as stack:
        for owner, name, function in (
            (torch.autocast, "__init__", init),
            (torch, "clear_autocast_cache", forget_all),
            # Without a device the question is for CUDA.
            (torch, "is_autocast_enabled", lambda device="cuda": is_enabled(meant(device))),
            (torch, "get_autocast_dtype", lambda device: get_dtype(meant(device))),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def run_fake(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on fake tensors.

    The meta kernel of ``_grouped_mm`` refuses all but bfloat16, which eager CPU does not; goes when
    it takes what the kernels take. FakeTensorMode needs 0.3 ms for each tensor of a ``_foreach``
    op, seconds for an optimizer step, though those in place return nothing and the others tensors
    like the given ones; goes when it is as fast. The meta kernels of some norms take strides from
    the wrong tensor, that of ``view`` gives dimensions of one element other strides, by which later
    kernels tell memory formats; goes when they follow the kernels.
    """
    packet = func.overloadpacket
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
        halves = (args[0].bfloat16(), args[1].bfloat16(), *args[2:])
        return func(*halves, **kwargs).to(args[0].dtype)
    if packet.__name__.startswith("_foreach_") and all(t.dim() for t in args[0]):  # no step counts
        if func._schema.is_mutable and not func._schema.returns:
            return None
        if packet in _FOREACH_LIKE_GIVEN and all(t.is_floating_point() for t in args[0]):
            return list(map(another_fake, args[0]))
    out = func(*args, **kwargs)
    if func is torch.ops.aten.view.default and 1 in out.shape and not args[0].is_contiguous():
        with real_execution():
            like = torch.empty_strided(args[0].shape, args[0].stride(), device="meta")
            stride = like.view(out.shape).stride()
        return out if out.stride() == stride else out.as_strided(out.shape, stride)
    if packet in _NORMS and isinstance(out[0], torch.Tensor):
        return (_laid_out_as_by_kernels(packet, out[0], args[_NORMS[packet]]), *out[1:])
    return out


# Formulas of autograd write into the zeros that they have just made, but not where a dispatch mode
# is on (``areAnyTensorSubclassLike``); goes when there is another way to watch a backward.
IN_PLACE_IN_BACKWARD = {
    torch.ops.aten.index_add.default: torch.ops.aten.index_add_.default,
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
    torch.ops.aten.put.default: torch.ops.aten.put_.default,
    torch.ops.aten.scatter.src: torch.ops.aten.scatter_.src,
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
}


def _laid_out_as_by_kernels(packet: Any, made: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The result of a norm, or the gradient for its ``source``, with the kernels' strides.

    These are contiguous for layer norm, else in the format of ``source``.
    """
    form = torch.contiguous_format
    if packet is not torch.ops.aten.native_layer_norm_backward and source.dim() == 4:
        if source.is_contiguous(memory_format=torch.channels_last) and not source.is_contiguous():
            form = torch.channels_last
    laid_out = torch.empty_like(made, memory_format=form)
    return made if made.stride() == laid_out.stride() else laid_out


# Norms whose meta kernels take the wrong strides, and the argument that has the right ones.
_NORMS = {
    torch.ops.aten.native_batch_norm: 0,
    torch.ops.aten.native_layer_norm_backward: 1,
    torch.ops.aten.native_group_norm_backward: 1,
    torch.ops.aten.native_batch_norm_backward: 1,
}
_FOREACH_LIKE_GIVEN = {
    getattr(torch.ops.aten, f"_foreach_{name}")
    for name in ("sqrt", "rsqrt", "neg", "abs", "sign", "reciprocal", "exp", "clone")
    if hasattr(torch.ops.aten, f"_foreach_{name}")  # clone is not in PyTorch 2.11
}


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile(model)`` wraps; the wrapper has no public way to it."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def without_compiler() -> AbstractContextManager[Any]:
    """Runs what is compiled as it is.

    Dynamo does not trace under dispatch modes, and gives up for good on a function that it met
    under one: after its capture a compiled model would run uncompiled, without a word.
    """
    if "torch._dynamo" not in sys.modules:  # slow to import
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class FakeOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs everything by :func:`run_fake`; enter it inside the fake tensor mode."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run_fake(func, args, kwargs or {})
