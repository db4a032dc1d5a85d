"""CUDA's autocast on fake CPU tensors.

Which ops autocast runs in which dtype is a list of each device, and the CPU's is another than
CUDA's: it leaves softmax and layer norms in the low precision, and saves accordingly. Autocast is a
dispatch key, so that the ops inside of ops are cast too; for the time of a capture the kernels at
the CPU's key are those of CUDA's lists, as ``torch/include/ATen/autocast_mode.h`` has them. What
casts a weight once and keeps the copy until the forward ends does so here.

Other threads that run under the CPU's autocast meanwhile get CUDA's lists too. Autocast of the
``torch.autocast("cuda")`` decorators that a model has made before, and of cuDNN's recurrent layers
(``_cudnn_rnn``: weights are cast into one buffer), is not emulated. Depends on the shims.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memfit.planner._compat import cuda_autocast_on_cpu, ops_with_autocast, other_kernels
from memfit.planner.shadows import tensors_in

_LOWER_PRECISION = """
    _convolution _convolution.deprecated convolution conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input cudnn_convolution cudnn_convolution_transpose
    prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul
    linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention
"""
_FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm
    group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa
"""
_FLOAT32_RESULT = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList
"""
# Overloads without a dtype, which are sent on to those that have one.
_FLOAT32_OVERLOAD = {
    "norm.Scalar": "norm.ScalarOpt_dtype",
    "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype",
}
_WIDEST = """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
"""
_REFUSED = "binary_cross_entropy"
# The CPU alone has these, and casts as CUDA does for what CUDA runs instead.
_KEPT = {"mkldnn_rnn_layer"}

_Kernel = Callable[..., Any]


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast of the CPU follows CUDA's lists; ``torch.autocast("cuda")`` is the CPU's."""
    casts = _Casts()
    with other_kernels("AutocastCPU", _kernels(casts)), cuda_autocast_on_cpu(casts.forget):
        yield


def in_lower_precision(function: _Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls ``function`` as autocast, if it is switched on, calls an op in the low precision."""
    if not torch.is_autocast_enabled("cpu"):
        return function(*args, **kwargs)
    low = torch.get_autocast_dtype("cpu")
    with autocast_left():
        args, kwargs = _mapped((args, kwargs), lambda tensor: _cast(tensor, low))
        return function(*args, **kwargs)


@contextmanager
def autocast_left() -> Iterator[None]:
    """Switches autocast off, as its kernels do around the op that they have cast for.

    Other than ``torch.autocast(enabled=False)`` this leaves the cache of casts alone.
    """
    enabled = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", enabled)


def _kernels(casts: "_Casts") -> dict[str, _Kernel | None]:
    """A kernel by op; None for the ops that only the CPU's autocast knows."""
    on_cuda, on_cpu = ops_with_autocast("CUDA"), ops_with_autocast("CPU")
    kernels: dict[str, _Kernel | None] = dict.fromkeys(on_cpu - on_cuda - _KEPT)
    # Ops that both cast down keep the kernel of the CPU, and with it the cache of casts.
    for name in set(_LOWER_PRECISION.split()) - on_cpu:
        kernels[name] = _lower_precision(_op(name), casts)
    for name in _FLOAT32.split():
        kernels[name] = _float32(_op(name))
    for name in _FLOAT32_RESULT.split():
        kernels[name] = _float32_result(_op(name))
    for name, overload in _FLOAT32_OVERLOAD.items():
        kernels[name] = _float32_overload(_op(name), _op(overload))
    for name in _WIDEST.split():
        kernels[name] = _widest(_op(name))
    kernels[_REFUSED] = _refuse
    return {name: kernels[name] for name in kernels if name in on_cuda | on_cpu}


def _op(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


# -- casts ---------------------------------------------------------------------------------------


def _is_eligible(value: Any) -> bool:
    """Whether autocast casts a value: ``is_eligible``."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if _is_eligible(value) else value


def _mapped(value: Any, cast: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return cast(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, cast) for v in value)
    if isinstance(value, dict):
        return {key: _mapped(v, cast) for key, v in value.items()}
    return value


class _Casts:
    """The copies of weights in the low precision: ``cached_cast``."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        self._known.clear()

    def lower(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not (
            tensor.dtype is torch.float32
            and tensor.requires_grad
            and tensor.is_leaf
            and not tensor._is_view()
            and torch.is_autocast_cache_enabled()
        ):
            return _cast(tensor, dtype)
        if id(tensor) not in self._known:
            self._known[id(tensor)] = tensor, _cast(tensor, dtype)
        return self._known[id(tensor)][1]


# -- policies: one function a kind of list, which makes the kernel of an op ------------------------


def _lower_precision(op: Any, casts: _Casts) -> _Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        low = torch.get_autocast_dtype("cpu")
        with autocast_left():
            args, kwargs = _mapped((args, kwargs), lambda tensor: casts.lower(tensor, low))
            return op(*args, **kwargs)

    return kernel


def _float32(op: Any) -> _Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with autocast_left():
            args, kwargs = _mapped((args, kwargs), lambda tensor: _cast(tensor, torch.float32))
            return op(*args, **kwargs)

    return kernel


def _float32_result(op: Any) -> _Kernel:
    """Sets the argument ``dtype``, unless the caller has."""
    position = [argument.name for argument in op._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with autocast_left():
            given = args[position] if position < len(args) else kwargs.get("dtype")
            if given is None and _is_eligible(args[0]):
                args, kwargs = args[:position], kwargs | {"dtype": torch.float32}
            return op(*args, **kwargs)

    return kernel


def _float32_overload(op: Any, with_dtype: Any) -> _Kernel:
    arguments = op._schema.arguments

    def kernel(*args: Any, **kwargs: Any) -> Any:
        # Arguments that have their default do not arrive here, and the other overload has none.
        given = {a.name: a.default_value for a in arguments[len(args) :]} | kwargs
        dtype = torch.float32 if _is_eligible(args[0]) else args[0].dtype
        with autocast_left():
            return with_dtype(*args, *given.values(), dtype=dtype)

    return kernel


def _widest(op: Any) -> _Kernel:
    """All in float32 if one tensor is, else in the low precision."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        wide = any(t.dtype is torch.float32 for t in tensors_in((args, kwargs)))
        dtype = torch.float32 if wide else torch.get_autocast_dtype("cpu")
        with autocast_left():
            args, kwargs = _mapped((args, kwargs), lambda tensor: _cast(tensor, dtype))
            return op(*args, **kwargs)

    return kernel


def _refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "on CUDA autocast refuses binary_cross_entropy and BCELoss, whose float16 gradients would "
        "be zero; use binary_cross_entropy_with_logits or BCEWithLogitsLoss"
    )
