"""The captured training step as plain records: ops, storages, saved tensors and module calls.

Time is counted in ops: *clock* ``c`` is the instant when ``c`` ops have run. An op with index ``i``
runs between clocks ``i`` and ``i + 1``; a storage that is released at clock ``c`` is alive during
the ops before ``c``. Storages are what an allocator sees: views and in-place results share one.

Depends on torch.fx alone; everything that plans (regions, costs, simulation) reads these records.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from torch import fx

# Elements of a dropped tensor that are kept, to see whether recomputation repeats it.
SAMPLE_ELEMENTS = 16
# Size of the float64 or int64 tensor that wraps a Python number.
NUMBER_BYTES = 8


class Phase(Enum):
    """Part of the training step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer step"


class Kind(Enum):
    """What a storage holds."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    OPTIMIZER = "optimizer state"
    BATCH = "batch"
    CONSTANT = "constant"
    WORKSPACE = "library workspace"
    GRADIENT = "gradient"
    KEPT_GRADIENT = "gradient of earlier steps"
    ACTIVATION = "activation"
    NUMBER = "Python number"
    BUCKET = "gradient bucket"
    WHOLE_PARAMETER = "gathered parameter"
    COLLECTIVE = "buffer of a collective"

    @property
    def resident(self) -> bool:
        """Whether the storage is allocated before the step begins."""
        return self not in _MADE_IN_STEP


_MADE_IN_STEP = (
    Kind.GRADIENT, Kind.ACTIVATION, Kind.NUMBER, Kind.WHOLE_PARAMETER, Kind.COLLECTIVE
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """An allocation."""

    size_bytes: int
    kind: Kind
    born: int
    """Index of the op that allocates it; -1 when it is there before the step."""
    released: int
    """Clock at which the last reference is gone, tensors that autograd saved not counted."""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    """Of the tensor that it was allocated for, such as ``int64``; empty for what is no tensor."""
    name: str = ""
    """Of the parameter, buffer or argument that it is, or belongs to; empty for what an op made."""

    def at(self, born: int, released: int) -> "Storage":
        """The same at another place of a step: a third of what ``replace`` takes."""
        return Storage(
            self.size_bytes, self.kind, born, released, self.shape, self.dtype, self.name
        )


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that autograd saved for the backward."""

    storage: int
    packed: int
    """Clock at which it was saved."""
    released: int
    """Clock at which autograd dropped it."""
    unpacked: int | None
    """Clock at which the backward first asked for it, if it did."""
    used_until: int
    """Clock until which the tensor that the backward got stays alive."""
    order: int
    """Place in the order in which the backward first asked; meaningless if it never did."""
    sample_bytes: int
    """Size of the sample by which a recomputed tensor is compared with this one."""
    own: bool = False
    """Whether the op that made the tensor saved it, its arguments still alive."""

    @property
    def until(self) -> int:
        """Clock until which saving keeps the storage alive."""
        return max(self.released, self.used_until)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module's forward."""

    module: str
    """FQN of the module; empty for the model itself."""
    type_name: str
    parent: int
    """Index of the enclosing call; -1 for the model's own."""
    start: int
    stop: int
    """Clocks before the first and after the last op."""
    saved: range
    """Indices of the tensors saved during the call."""
    inputs: tuple[int, ...]
    """Storages of its tensor arguments."""
    state: str = ""
    """What the call leaves behind beside its results, in words; empty for most."""
    unreadable: str = ""
    """What it is given whose tensors cannot be told, in words; empty for most."""


@dataclass(frozen=True, slots=True)
class Op:
    """One aten op of the step."""

    name: str
    phase: Phase
    call: int
    """Innermost module call (forward); -1 outside of any."""
    signature: str
    """Name with the shapes, dtypes and scalars of the arguments: equal for equal work."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """Storages of the results, aliases of inputs included."""
    written: tuple[int, ...]
    """Storages that the op changes in place."""
    random: bool
    dtype: str
    """Of the floating point work, such as ``bfloat16``; empty when there is none."""
    flops: int
    moved_bytes: int
    """Bytes that the op reads and writes; 0 for a view."""
    seconds: float = 0.0
    workspace_bytes: int = 0
    """Allocated inside the op and free again when it returns."""


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A training step: forward, backward and, if asked for, the optimizer step."""

    nodes: Mapping[int, fx.Node]
    """The ops as nodes of an fx graph, with ``shape``, ``stride`` and ``dtype`` in the meta.

    An op of a repeated layer has the node of the layer that was recorded, a collective has none.
    """
    ops: tuple[Op, ...]
    storages: tuple[Storage, ...]
    saved: tuple[Saved, ...]
    calls: tuple[Call, ...]
    notes: tuple[str, ...] = ()
    """Assumptions made while capturing, for people."""
    margin: float = 0.0
    """Share of what the step adds that a plan leaves free, where values were assumed."""
    recomputation_seconds: float = 0.0
    """What each recomputation takes beside its ops: a sample is copied and compared."""

    def resident_bytes(self, allocation_bytes: int = 1) -> int:
        """Bytes allocated before the step begins, each size rounded up to a multiple."""
        sizes = (s.size_bytes for s in self.storages if s.kind.resident)
        return sum(-(-size // allocation_bytes) * allocation_bytes for size in sizes)

    @property
    def seconds(self) -> float:
        """Seconds of the step when nothing is recomputed."""
        return sum(op.seconds for op in self.ops)

    def beside_workspace(self, size_bytes: int) -> "StepGraph":
        """The step on a GPU whose libraries took ``size_bytes`` for themselves in an earlier one.

        Python numbers, and the step counts of optimizers, stay in host memory.
        """
        workspace = Storage(size_bytes, Kind.WORKSPACE, -1, len(self.ops))
        own = (
            replace(s, size_bytes=0)
            if s.kind is Kind.NUMBER or (s.kind is Kind.OPTIMIZER and s.size_bytes <= 8)
            else s
            for s in self.storages
        )
        return replace(self, storages=(*own, workspace))

    def format(self) -> str:
        """The graph as text, one op a line: storages as ``%3``, results before the op's name."""
        lines = []
        for op in self.ops:
            inputs = " ".join(f"%{s}" for s in op.inputs)
            outputs = " ".join(f"%{s}" for s in op.outputs)
            module = self.calls[op.call].module if op.call >= 0 else ""
            lines.append(
                f"{outputs or '-':<8} = {op.signature} [{inputs}] {op.phase.value} {module}"
            )
        for index, saved in enumerate(self.saved):
            lines.append(
                f"saved {index}: %{saved.storage} packed {saved.packed} unpacked {saved.unpacked}"
            )
        return "\n".join(line.rstrip() for line in lines) + "\n"
