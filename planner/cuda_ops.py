"""Makes a step that runs on fake CPU tensors take the ops that a CUDA device takes.

Fake ``cuda`` tensors need a CUDA build for their backward, so captures run on fake ``cpu`` tensors;
there functions take other ops, and autograd saves other tensors, than on a GPU:

- dropout: CUDA saves a mask of booleans (``native_dropout``), the CPU one in the input's dtype.
- ``scaled_dot_product_attention``: cuDNN, flash, memory-efficient or plain math, chosen as PyTorch
  chooses: ``select_sdp_backend`` in ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, the
  checks of ``sdp_utils_cpp.h`` beside it (that header is in the wheel too), and what surrounds the
  kernels, padding and masks, in ``aten/src/ATen/native/transformers/attention.cpp``.
- mean and rstd of LayerNorm and BatchNorm: CUDA saves them in float32, the CPU in the dtype of the
  input. (Those of GroupNorm are alike on both: ``aten/src/ATen/native/group_norm.cpp``.)
- ``F.rms_norm``: one op on CUDA, ``_fused_rms_norm``, which saves its input, the weight and a rstd
  in float32; where input and weight are of different dtypes, its parts, as on the CPU.
- softmax and log_softmax of float16 in float32: CUDA makes no float32 copy of the input.
- autocast: its lists of ops, see ``cuda_autocast.py``.

Not emulated: workspaces inside of the memory-efficient and cuDNN backward, whose sizes the kernels
and the library choose (``workspace.py`` has that of flash); storage offsets that are not aligned;
what runs inside of ``F.multi_head_attention_forward``; cuDNN's recurrent layers, and what cuDNN's
batch norm reserves; nested tensors; kernels that were switched off (``sdpa_kernel``); ROCm. The
random seeds of memory-efficient attention and cuDNN are on the CPU with CUDA, and count 16 bytes
here.

A mask that needs a gradient (T5's position bias) does not lead to math: memory-efficient attention
has a gradient for it, only cuDNN refuses it. Depends on the shims and on autocast.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion

from memfit.planner._compat import TorchDispatchMode, other_kernels
from memfit.planner.cuda_autocast import autocast_left, cuda_autocast, in_lower_precision

Kernel = Literal["cudnn", "flash", "efficient", "math"]

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
# Their mean and rstd are in float32 on CUDA, in the dtype of their input on the CPU.
_SAVES_FLOAT32 = (_aten.native_layer_norm.default, _aten.native_batch_norm.default)
_AMPERE = (8, 0)
_NEWEST = (12, 1)
_FLASH_HEAD = 256
_CUDNN_HEAD = 128
# Biases of memory-efficient attention start their rows at multiples of this many elements.
_BIAS_ALIGNMENT = 8
# Up to PyTorch 2.13 only flash, cuDNN and math take fewer heads of keys than of queries, as the
# documentation of scaled_dot_product_attention says; memory-efficient joins them in 2.14.
_EFFICIENT_GROUPS = TorchVersion(torch.__version__) >= TorchVersion("2.14")
# From 2.12 on cuDNN gets only dropout that it can resolve, which is multiples of 1/16.
_CUDNN_ANY_DROPOUT = TorchVersion(torch.__version__) < TorchVersion("2.12")


def cuda_modes(
    capability: tuple[int, int] = _AMPERE, *, cudnn: bool | None = None
) -> tuple[AbstractContextManager[Any], ...]:
    """The contexts to enter around a step on fake CPU tensors, before what records it.

    ``capability`` is the compute capability: (7, 5) for a T4, (9, 0) for an H100. ``cudnn`` says
    whether cuDNN's attention comes first; left out, it does where PyTorch has it so: on (9, 0),
    (10, 0) and (10, 3) with a cuDNN after 9.15.0, which the CUDA 13 wheels have.
    """
    if cudnn is None:
        cudnn = capability in {(9, 0), (10, 0), (10, 3)}
    results = _CudaResults()  # type: ignore[no-untyped-call]
    return _CudaFunctions(capability, cudnn), results, _cuda_kernels(), cuda_autocast()


class _CudaFunctions(TorchFunctionMode):
    """Replaces the functions whose CUDA implementation saves something else."""

    def __init__(self, capability: tuple[int, int], cudnn: bool) -> None:
        super().__init__()
        self._capability = capability
        self._cudnn = cudnn

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return _functional_dropout(*args, **kwargs)
        if func is torch.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return in_lower_precision(self._attention, args, kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        call = AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        kernel = choose_kernel(call, self._capability, cudnn=self._cudnn)
        return _KERNELS[kernel](call)


class _CudaResults(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives the results of ops the dtypes that they have on CUDA."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Kernels stand below autocast; fake tensors run some in Python, which do not.
        with autocast_left():
            out = func(*args, **(kwargs or {}))
            if func in _SAVES_FLOAT32:
                return out[0], *(t.float() if t.dtype in _HALF else t for t in out[1:])
            return out


@contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Ops that the CPU takes apart where CUDA does not."""
    # With a kernel for it, autograd takes the op's own formula, and fake tensors its shapes.
    norm = {"_fused_rms_norm": _aten._fused_rms_norm.default.decompose}
    softmax = {
        "softmax.int": _half_to_float(_aten.softmax.int, _aten._softmax.default),
        "log_softmax.int": _half_to_float(_aten.log_softmax.int, _aten._log_softmax.default),
    }
    with other_kernels("CPU", norm), other_kernels("AutogradCPU", softmax):
        yield


def _half_to_float(op: Any, kernel: Any) -> Callable[..., Tensor]:
    def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if input.dtype is torch.float16 and dtype is torch.float32:
            return cast(Tensor, kernel(input, dim, True))
        return cast(Tensor, op.decompose(input, dim, dtype))

    return softmax


def _functional_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    # In place CUDA has no fused kernel: it multiplies with noise as the CPU does.
    if inplace:
        return F.dropout(input, p, training, inplace=True)
    return _dropout(input, p, training)


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """``is_fused_kernel_acceptable`` in aten/src/ATen/native/Dropout.cpp."""
    if train and 0 < p < 1 and input.numel() > 0:
        return torch.native_dropout(input, p, train)[0]
    return F.dropout(input, p, train)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of ``scaled_dot_product_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False

    @property
    def needs_grad(self) -> bool:
        inputs = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)

    def bias(self) -> Tensor | None:
        """The mask as numbers to add (``convert_boolean_attn_mask``)."""
        if self.mask is None or self.mask.dtype is not torch.bool:
            return self.mask
        dtype, device = self.query.dtype, self.mask.device
        hidden = torch.scalar_tensor(-math.inf, dtype=dtype, device=device)
        shown = torch.scalar_tensor(0.0, dtype=dtype, device=device)
        return torch.where(self.mask, shown, hidden)


# -- the choice ----------------------------------------------------------------------------------


def choose_kernel(call: AttentionCall, capability: tuple[int, int], *, cudnn: bool) -> Kernel:
    """The kernel that PyTorch takes: the first whose checks pass (``select_sdp_backend``)."""
    if cudnn and _can_use_cudnn(call, capability):
        return "cudnn"
    if _can_use_flash(call, capability):
        return "flash"
    if _can_use_efficient(call, capability):
        return "efficient"
    return "math"


def _can_use_cudnn(call: AttentionCall, capability: tuple[int, int]) -> bool:
    heads = (call.query.shape[-1], call.value.shape[-1])
    return (
        _AMPERE <= capability <= _NEWEST
        and _is_regular(call, takes_groups=True)
        and call.query.dtype in _HALF
        and (all(h <= _CUDNN_HEAD for h in heads) or heads == (192, 128))
        and all(h % 8 == 0 for h in heads)
        and _fits_mask(call)
        and (_CUDNN_ANY_DROPOUT or float(call.dropout * 16).is_integer())
        and call.key.shape[-2] != 1
        and not (call.dropout and call.query.shape[-2] == 1)
    )


def _can_use_flash(call: AttentionCall, capability: tuple[int, int]) -> bool:
    head = call.query.shape[-1]
    return (
        _AMPERE <= capability <= _NEWEST
        and call.mask is None
        and _is_regular(call, takes_groups=True)
        and call.query.dtype in _HALF
        and head == call.key.shape[-1] == call.value.shape[-1] <= _FLASH_HEAD
        and not (call.causal and call.query.shape[-2] != call.key.shape[-2])
        and not (call.needs_grad and _lacks_flash_backward(head, call.dropout, capability))
    )


def _lacks_flash_backward(head: int, dropout: float, capability: tuple[int, int]) -> bool:
    """GPUs with less shared memory than an A100 (``..._gt192_constraints_on_sm86_89_or_120``)."""
    small = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= _NEWEST
    return small and (192 < head <= 224 or (head > 224 and dropout > 0))


def _can_use_efficient(call: AttentionCall, capability: tuple[int, int]) -> bool:
    query, head = call.query, call.query.shape[-1]
    dtypes = (*_HALF, torch.float32) if capability >= _AMPERE else (torch.float16, torch.float32)
    alignment = _head_alignment(query.dtype, capability)
    return (
        (5, 0) <= capability <= _NEWEST
        and query.dtype in dtypes
        and _is_regular(call, takes_groups=_EFFICIENT_GROUPS)
        and head == call.key.shape[-1]
        and head % alignment == 0
        and call.value.shape[-1] % alignment == 0
    )


def _head_alignment(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """``minimum_gemm_alignment``: in elements."""
    if dtype in _HALF:
        return 8 if capability >= (7, 0) else 1
    return 4 if capability >= _AMPERE else 1


def _is_regular(call: AttentionCall, *, takes_groups: bool) -> bool:
    """What all fused kernels ask for: ranks, sizes and strides."""
    query, key, value = call.query, call.key, call.value
    tensors = (query, key, value)
    if any(t.dim() != 4 or t.dtype is not query.dtype for t in tensors):
        return False
    if query.shape[0] != key.shape[0] or query.shape[0] != value.shape[0]:
        return False
    heads = (query.shape[1], key.shape[1], value.shape[1])
    if call.grouped and takes_groups:
        if heads[1] != heads[2] or heads[0] % heads[1]:
            return False
    elif len(set(heads)) > 1:
        return False
    if any(t.numel() == 0 or t.stride(-1) != 1 for t in tensors):
        return False
    return call.mask is None or call.mask.stride(-1) == 1


def _fits_mask(call: AttentionCall) -> bool:
    """``check_attn_mask_shape``, which cuDNN asks for; memory-efficient attention does not."""
    mask = call.mask
    if mask is None:
        return True
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    full = (*call.query.shape[:3], call.key.shape[2])[-mask.dim() :]
    return all(m in (1, n) for m, n in zip(mask.shape, full, strict=True))


# -- the kernels ---------------------------------------------------------------------------------


def _cudnn_attention(call: AttentionCall) -> Tensor:
    out = _aten._scaled_dot_product_cudnn_attention(
        call.query,
        call.key,
        call.value,
        call.bias(),
        call.needs_grad,
        call.dropout,
        call.causal,
        scale=call.scale,
    )
    return cast(Tensor, out[0])


def _flash_attention(call: AttentionCall) -> Tensor:
    """Heads are padded to a multiple of 8 outside of the kernel, so that autograd sees it."""
    head = call.query.shape[-1]
    scale = call.scale if call.scale is not None else head**-0.5
    padding = -head % 8
    tensors = (call.query, call.key, call.value)
    if padding:
        query, key, value = (F.pad(t, (0, padding)) for t in tensors)
    else:
        query, key, value = tensors
    out: Tensor = _aten._scaled_dot_product_flash_attention(
        query, key, value, call.dropout, call.causal, False, scale=scale
    )[0]
    return out[..., :head] if padding else out


def _efficient_attention(call: AttentionCall) -> Tensor:
    bias = call.bias()
    if bias is not None:
        bias = _align_rows(bias)
        bias = bias.expand(*call.query.shape[:3], call.key.shape[2])
    out = _aten._scaled_dot_product_efficient_attention(
        call.query,
        call.key,
        call.value,
        bias,
        call.needs_grad,
        call.dropout,
        call.causal,
        scale=call.scale,
    )
    return cast(Tensor, out[0])


def _align_rows(bias: Tensor) -> Tensor:
    """``preprocess_mask``: a bias with unaligned rows is copied to wider ones, then narrowed."""
    if all(stride % _BIAS_ALIGNMENT == 0 for stride in bias.stride()[:-1]):
        return bias
    width = bias.shape[-1]
    return F.pad(bias, (0, _BIAS_ALIGNMENT - width % _BIAS_ALIGNMENT))[..., :width]


def _math_attention(call: AttentionCall) -> Tensor:
    """``_scaled_dot_product_attention_math``, op by op, its locals alive until it returns.

    The op itself would see that fake tensors are not plain ones and add the bias out of place, and
    would take the CPU's dropout.
    """
    dtype = call.query.dtype
    full = replace(call, query=_widen(call.query), key=_widen(call.key), value=_widen(call.value))
    scale = call.scale if call.scale is not None else full.query.shape[-1] ** -0.5
    factor = math.sqrt(abs(scale))
    query: Tensor = _aten.mul.Scalar(full.query, math.copysign(factor, scale))
    bias = _causal_bias(full) if call.causal else call.bias()
    times = query.shape[-3] // full.key.shape[-3] if call.grouped else 1
    key, value = _repeat_heads(full.key, times), _repeat_heads(full.value, times)
    scores = torch.matmul(query, _aten.mul.Scalar(key.transpose(-2, -1), factor))
    if bias is not None:
        scores.add_(bias)
    scores = _aten._safe_softmax(scores, -1)
    if call.dropout > 0:
        scores = _dropout(scores, call.dropout, True)
    # The op returns the weights too, in the dtype of its inputs, and makes them first.
    weights = scores.to(dtype)
    out = torch.matmul(scores, value).to(dtype)
    del weights
    return out


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _causal_bias(call: AttentionCall) -> Tensor | None:
    shape = (call.query.shape[-2], call.key.shape[-2])
    seen = torch.ones(shape, dtype=torch.bool, device=call.query.device).tril()
    return replace(call, mask=seen).bias()


def _repeat_heads(tensor: Tensor, times: int) -> Tensor:
    return tensor if times == 1 else tensor.repeat_interleave(times, -3)


_KERNELS = {
    "cudnn": _cudnn_attention,
    "flash": _flash_attention,
    "efficient": _efficient_attention,
    "math": _math_attention,
}
