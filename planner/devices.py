"""What memfit knows about devices: how much they hold, how fast they are, how they allocate.

Peak figures are dense ones (structured sparsity doubles them on paper and never in training) with
float32 accumulation, as PyTorch multiplies matrices. A plan for a device that is not at hand is
priced with them; where the device is at hand, measured times take their place. Depends on the
errors only; torch is imported when the current GPU is asked for, so that the table costs nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from memfit.planner.errors import MemfitError

Kind = Literal["cpu", "cuda"]

# What the PyTorch caching allocator rounds every allocation up to: kMinBlockSize in
# c10/cuda/CUDACachingAllocator.
_CUDA_ALLOCATION_BYTES = 512

# parseChosenWorkspaceSize() in PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp: ":4096:2:16:8",
# and 32 MiB on Hopper and Blackwell. cuBLASLt shares that buffer unless the environment says
# otherwise. On MI300 rocBLAS takes 128 MiB, and hipBLASLt has 76 MiB of its own.
_CUBLAS_WORKSPACE_BYTES = (2 * 4096 + 8 * 16) * 1024
_CUBLAS_LARGE_WORKSPACE_BYTES = 32 * 2**20
_ROCM_WORKSPACE_BYTES = (128 + 76) * 2**20

# maxThreadsPerMultiProcessor by compute capability, from NVIDIA's CUDA programming guide.
_THREADS = {(7, 5): 1024, (8, 0): 2048, (9, 0): 2048, (10, 0): 2048}
_FEWER_THREADS = 1536


class DeviceError(MemfitError, ValueError):
    """A device is not known, or not present."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device as the planner sees it."""

    name: str
    kind: Kind
    """ROCm devices are ``cuda`` too, as in PyTorch."""
    memory_bytes: int
    """What PyTorch reports as the total, which is up to 8 % less than the name on the box."""
    flops: Mapping[str, float] = field(hash=False)
    """Peak FLOP/s by dtype name; ``tf32`` is what float32 runs at once TF32 is allowed."""
    bandwidth_bytes_per_second: float
    source: str
    """The vendor's document for the peak figures, and when they were last compared with others."""
    launch_seconds: float = 5e-6
    """Least time between two kernels: eager PyTorch is bound by it where tensors are small."""
    compute_efficiency: float = 0.65
    """Assumed share of the peak that matrix multiplications reach; large ones reach 0.6 to 0.7."""
    bandwidth_efficiency: float = 0.8
    """Assumed share of the bandwidth that elementwise kernels reach."""
    allocation_bytes: int = _CUDA_ALLOCATION_BYTES
    """Every allocation takes a multiple of this."""
    compute_capability: tuple[int, int] = (8, 0)
    """Decides which attention kernels PyTorch takes; ROCm's are taken to be those of (8, 0)."""
    multiprocessors: int = 0
    """Reductions are split into as many blocks as these can hold, which sets their workspace."""
    workspace_bytes: int = 0
    """What a BLAS handle takes from the allocator at its first matrix multiplication.

    There is one per thread and stream, and autograd runs backward in a thread of its own: a step
    holds two. Released when the process ends or, from PyTorch 2.15 on, after every operation.
    """

    @property
    def threads_per_multiprocessor(self) -> int:
        """How many threads a multiprocessor of a GPU holds."""
        return _THREADS.get(self.compute_capability, _FEWER_THREADS)

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s for a dtype name without its ``torch.``; what the table lacks runs as float32."""
        return self.flops.get(dtype, self.flops["float32"])


def device(name: str) -> Device:
    """The device called ``name``: one of :data:`DEVICES`, or ``"cuda"`` for the current GPU."""
    key = name.strip().lower().replace("_", "-")
    if re.fullmatch(r"cuda(:\d+)?", key):
        return _present_gpu(key)
    if key not in DEVICES:
        raise DeviceError(
            f"{name!r} is not a device that memfit knows. Known are {_known_names()}, and 'cuda' "
            "for the GPU of this machine; name the one nearest to yours."
        )
    return DEVICES[key]


def _present_gpu(name: str) -> Device:
    import torch  # two seconds, which the table alone must not cost

    if not torch.cuda.is_available():
        raise DeviceError(
            f"{name!r} was asked for, but PyTorch sees no GPU here. Name the GPU that you plan "
            f"for: {_known_names()}."
        )
    properties = torch.cuda.get_device_properties(name)
    return device_reported_as(properties.name, properties.total_memory)


def device_reported_as(reported_name: str, memory_bytes: int) -> Device:
    """The device that a driver reports under ``reported_name``, with the memory that it reports."""
    for pattern, name in _REPORTED_NAMES.items():
        if re.fullmatch(pattern, reported_name):
            return replace(DEVICES[name], memory_bytes=memory_bytes)
    raise DeviceError(
        f"memfit has no figures for the GPU {reported_name!r}. Name the known device that is "
        f"nearest to it ({_known_names()}): its speeds only rank the plans, and the budget in "
        "bytes stays yours to give."
    )


def _known_names() -> str:
    return ", ".join(repr(name) for name in DEVICES)


def _cuda(
    name: str,
    *,
    memory_gib: float,
    float32: float,
    tf32: float,
    float16: float,
    bandwidth: float,
    multiprocessors: int,
    source: str,
    capability: tuple[int, int] = (8, 0),
    bfloat16: float | None = None,
    workspace_bytes: int = _CUBLAS_WORKSPACE_BYTES,
) -> Device:
    """A GPU of the table; ``bfloat16`` is as fast as ``float16`` unless it is given."""
    flops = {
        "float32": float32,
        "tf32": tf32,
        "float16": float16,
        "bfloat16": float16 if bfloat16 is None else bfloat16,
    }
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=int(memory_gib * 2**30),
        flops=MappingProxyType(flops),
        bandwidth_bytes_per_second=bandwidth,
        source=f"{source}, checked 2026-11",
        compute_capability=capability,
        multiprocessors=multiprocessors,
        workspace_bytes=workspace_bytes,
    )


# Checked against the tables of torchtitan (get_peak_flops), of PyTorch (inductor's device_info.py:
# it counts sparsity, and lists the bandwidth of the H100 for the L4), and published ones.
#
# memory_gib is the least total capacity that PyTorch users quote from their out-of-memory errors:
# ECC and the driver keep some of the gigabytes that the box promises.
_TABLE = (
    _cuda(
        "h100",
        capability=(9, 0),
        memory_gib=79.10,
        float32=67e12,
        tf32=494.5e12,
        float16=989e12,
        bandwidth=3.35e12,
        multiprocessors=132,
        workspace_bytes=_CUBLAS_LARGE_WORKSPACE_BYTES,
        source="NVIDIA H100 Tensor Core GPU datasheet, SXM, halved where marked 'with sparsity'",
    ),
    _cuda(
        "h200",
        capability=(9, 0),
        memory_gib=139.70,
        float32=67e12,
        tf32=494.5e12,
        float16=989e12,
        bandwidth=4.8e12,
        multiprocessors=132,
        workspace_bytes=_CUBLAS_LARGE_WORKSPACE_BYTES,
        source="NVIDIA H200 Tensor Core GPU datasheet, SXM, halved where marked 'with sparsity'",
    ),
    _cuda(
        "b200",
        capability=(10, 0),
        memory_gib=178.35,
        float32=75e12,
        tf32=1100e12,
        float16=2250e12,
        bandwidth=8.0e12,
        multiprocessors=148,
        workspace_bytes=_CUBLAS_LARGE_WORKSPACE_BYTES,
        source="NVIDIA Blackwell architecture datasheet, HGX B200 per GPU, dense",
    ),
    _cuda(
        "a100-40gb",
        memory_gib=39.38,
        float32=19.5e12,
        tf32=156e12,
        float16=312e12,
        bandwidth=1.555e12,
        multiprocessors=108,
        source="NVIDIA A100 Tensor Core GPU datasheet, 40 GB",
    ),
    _cuda(
        "a100-80gb",
        memory_gib=79.14,
        float32=19.5e12,
        tf32=156e12,
        float16=312e12,
        bandwidth=2.039e12,
        multiprocessors=108,
        source="NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM",
    ),
    _cuda(
        "a10g",
        capability=(8, 6),
        memory_gib=21.98,
        float32=31.5e12,
        tf32=35e12,
        float16=70e12,
        bandwidth=600e9,
        multiprocessors=80,
        source="NVIDIA A10G datasheet for Amazon EC2 G5, dense",
    ),
    _cuda(
        "l4",
        capability=(8, 9),
        memory_gib=21.95,
        float32=30.3e12,
        tf32=60e12,
        float16=121e12,
        bandwidth=300e9,
        multiprocessors=58,
        source="NVIDIA L4 Tensor Core GPU datasheet, halved where marked 'with sparsity'",
    ),
    _cuda(
        "t4",
        capability=(7, 5),
        memory_gib=14.56,
        float32=8.1e12,
        tf32=8.1e12,  # Turing has no TF32, and computes bfloat16 as float32
        float16=65e12,
        bfloat16=8.1e12,
        bandwidth=320e9,
        multiprocessors=40,
        source="NVIDIA T4 Tensor Core GPU datasheet",
    ),
    _cuda(
        "rtx3090",
        capability=(8, 6),
        memory_gib=23.56,
        float32=35.6e12,
        tf32=35.6e12,
        float16=71e12,
        bandwidth=936e9,
        multiprocessors=82,
        source="NVIDIA Ampere GA102 GPU architecture whitepaper, dense, FP32 accumulate",
    ),
    _cuda(
        "rtx4090",
        capability=(8, 9),
        memory_gib=23.51,
        float32=82.6e12,
        tf32=82.6e12,
        float16=165.2e12,
        bandwidth=1.008e12,
        multiprocessors=128,
        source="NVIDIA Ada GPU architecture whitepaper, dense, FP32 accumulate",
    ),
    _cuda(
        "rtx5090",
        capability=(12, 0),
        memory_gib=31.36,
        float32=104.8e12,
        tf32=104.8e12,
        float16=209.5e12,
        bandwidth=1.792e12,
        multiprocessors=170,
        workspace_bytes=_CUBLAS_LARGE_WORKSPACE_BYTES,
        source="NVIDIA RTX Blackwell GPU architecture whitepaper, dense, FP32 accumulate",
    ),
    _cuda(
        "mi300x",
        memory_gib=191.69,
        float32=163.4e12,
        tf32=653.7e12,
        float16=1307.4e12,
        bandwidth=5.3e12,
        multiprocessors=304,
        workspace_bytes=_ROCM_WORKSPACE_BYTES,
        source="AMD Instinct MI300X accelerator data sheet",
    ),
    # PyTorch's CPU allocator neither rounds nor caches, and its BLAS takes no workspace from it.
    Device(
        name="cpu",
        kind="cpu",
        memory_bytes=16 * 2**30,
        flops=MappingProxyType(
            {"float32": 300e9, "tf32": 300e9, "float16": 300e9, "bfloat16": 300e9, "float64": 150e9}
        ),
        bandwidth_bytes_per_second=30e9,
        source="nominal: two AVX-512 cores without AMX, rounded from a measured machine, 2026-11",
        launch_seconds=2e-6,
        allocation_bytes=1,
    ),
)

DEVICES: Mapping[str, Device] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""All known devices by name."""

# Whole names and not parts of them: "L4" is in "L40S", "H200" in "GH200", "RTX 4090" in
# "RTX 4090 Laptop GPU", and the H100 PCIe and NVL are slower cards than the H100 SXM.
_REPORTED_NAMES = {
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H200": "h200",
    r"NVIDIA B200": "b200",
    r"(NVIDIA )?A100-(SXM4|PCIE)-40GB": "a100-40gb",
    r"(NVIDIA )?A100-SXM4-80GB|NVIDIA A100 80GB PCIe": "a100-80gb",
    r"NVIDIA A10G": "a10g",
    r"NVIDIA L4": "l4",
    r"Tesla T4|NVIDIA T4": "t4",
    r"(NVIDIA )?GeForce RTX 3090": "rtx3090",
    r"NVIDIA GeForce RTX 4090": "rtx4090",
    r"NVIDIA GeForce RTX 5090": "rtx5090",
    r"AMD Instinct MI300X( VF)?": "mi300x",
}
