"""The device that a plan is for: what it is, which kernels it takes, how much of it is free.

Depends on the device table and on torch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memfit.planner import devices
from memfit.planner.budget import BudgetError, parse_budget
from memfit.planner.cuda_workspace import with_cuda_workspace
from memfit.planner.devices import Device
from memfit.planner.step_graph import StepGraph
from memfit.planner.workspace import with_cpu_workspace

# What the current GPU has free is not all for the step: fragments and other users of the driver.
AUTO_MARGIN = 0.05
# A model on ``meta`` on a machine without a GPU is planned for CUDA; its seconds are this card's.
_NOMINAL_GPU = "a100-80gb"
# Size of a saved CPU generator state, which torch.utils.checkpoint stores for each region. That of
# a GPU is kept in host memory too.
_CPU_RNG_STATE_BYTES = 5056
# cuBLASLt, which adds biases to products, keeps this beside the buffer that it shares with cuBLAS.
_CUBLASLT_BYTES = 2**20
# Of a cached block the caching allocator leaves up to 1 MiB unsplit (kLargeBuffer's remainder in
# c10/cuda/CUDACachingAllocator); on an H100 that came to 2.25 MiB at the peak of a step at most.
_SLACK_BYTES = 4 * 2**20
_AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Target:
    """A device and how the captured step is to be read for it."""

    device: Device
    emulated: bool
    """The step runs on fake CPU tensors and takes the ops that CUDA would take."""
    notes: tuple[str, ...] = ()

    @property
    def rng_state_bytes(self) -> int:
        """Device memory that a saved generator state takes."""
        return _CPU_RNG_STATE_BYTES if self.device.kind == "cpu" else 0

    def with_workspace(self, step: StepGraph) -> StepGraph:
        """``step`` with what libraries allocate beside tensors.

        That is inside of ops. On a GPU it is also what BLAS keeps; the backward runs in a thread of
        autograd with a handle of its own.
        """
        if self.device.kind == "cpu":
            return with_cpu_workspace(step)
        blas_bytes = self.device.workspace_bytes
        if any(op.name.startswith("aten.addmm.") for op in step.ops):
            blas_bytes += _CUBLASLT_BYTES
        return with_cuda_workspace(step, self.device).beside_workspace(2 * blas_bytes)

    @property
    def slack_bytes(self) -> int:
        """What a plan leaves free of its budget for what the allocator rounds up unforeseeably."""
        return _SLACK_BYTES if self.device.kind == "cuda" else 0

    @property
    def is_present(self) -> bool:
        """Whether the device is this machine's."""
        if self.device.kind == "cpu":
            return True
        if not torch.cuda.is_available():
            return False
        try:
            return self.device.name == devices.device("cuda").name
        except devices.DeviceError:  # a GPU that the table does not know
            return False

    def present(self) -> torch.device:
        """The device itself, to measure on; :class:`DeviceError` when it is not this machine's."""
        if not self.is_present:
            raise devices.DeviceError(
                f"{self.device.name!r} is not a device of this machine, so nothing can be measured "
                "on it; use costs='roofline'"
            )
        return torch.device(self.device.kind)

    def autocast_dtype(self, name: str | torch.dtype | None) -> torch.dtype | None:
        """Reads the ``autocast`` argument of ``plan``: by default what is switched on here.

        An emulated step casts as the device does: its modes have CUDA's lists of ops.
        """
        kind = self.device.kind
        if name is None and torch.is_autocast_enabled(kind):
            name = torch.get_autocast_dtype(kind)
        if name is None:
            return None
        dtype = getattr(torch, name, None) if isinstance(name, str) else name
        if dtype not in _AUTOCAST_DTYPES:
            raise ValueError(f"autocast is {name!r}; known are 'bfloat16' and 'float16'")
        return dtype

    def modes(self) -> tuple[Any, ...]:
        """Contexts under which the step is captured."""
        if not self.emulated:
            return ()
        from memfit.planner.cuda_ops import cuda_modes

        return cuda_modes(self.device.compute_capability)


def find_target(model: nn.Module, name: str | None) -> Target:
    """Reads the ``device`` argument of ``plan``: by default where the model is, CUDA for meta."""
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    notes: tuple[str, ...] = ()
    if name is None:
        name = place.type if place.type != "meta" else "cuda"
        if name == "cuda" and not torch.cuda.is_available():
            name = _NOMINAL_GPU
            notes = (f"no device named and no GPU here: planned for {name}",)
    device = devices.device(name)
    emulated = device.kind == "cuda" and place.type != "cuda"
    return Target(device, emulated, notes)


def resolve_budget(budget: int | str, target: Target) -> int:
    """Bytes of a budget as ``plan`` takes it."""
    return free_bytes(target) if budget == "auto" else parse_budget(budget)


def free_bytes(target: Target) -> int:
    """The budget ``"auto"``: what the current GPU has free or holds for torch, less the margin."""
    if target.device.kind != "cuda" or not torch.cuda.is_available():
        raise BudgetError(
            f"budget 'auto' reads the free memory of a GPU, and {target.device.name!r} is not at "
            'hand; give the bytes, such as "24GiB"'
        )
    free, _ = torch.cuda.mem_get_info()
    return int((free + torch.cuda.memory_reserved()) * (1 - AUTO_MARGIN))
