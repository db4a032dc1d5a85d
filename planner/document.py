"""The plan as frozen data, and its JSON form. Attributes are named as the JSON keys.

``Plan.save`` and ``Plan.load`` are exact inverses; reading checks every key and type and names the
offending one. Python keywords get a trailing underscore (``plan.model.class_``). Depends on
the solvers' records and on ``timeline`` alone, so that a plan can be shown without importing
torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from memfit.planner.errors import PlanError
from memfit.planner.timeline import MemoryTimeline
from memfit.solvers.records import RecordError, decode, encode, read, write

SCHEMA = "memfit.plan/1"
ACTIONS = ("keep", "checkpoint", "selective")


@dataclass(frozen=True, slots=True)
class MadeWith:
    """Versions of what made the plan."""

    memfit: str
    torch: str
    transformers: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """The model that the plan is for."""

    class_: str
    fingerprint: str
    parameters: int
    trainable_parameters: int
    dtype: str | None = None
    """Of its first floating point parameter, as of a config."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor of the batch."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Workload:
    """The training step that was planned."""

    batch: dict[str, TensorSpec]
    optimizer: str | None
    device: str
    costs: str
    """Where the seconds come from."""
    keep_outputs: bool
    """Whether the caller holds the model's outputs during the backward."""
    autocast: str | None = None
    """Dtype of the autocast under which the forward runs."""
    notes: tuple[str, ...] = ()
    """Assumptions, for people."""
    keep_gradients: bool = False
    """Whether gradients of earlier steps are there when the step begins."""
    max_grad_norm: float | None = None
    """To what gradients are clipped before the optimizer step."""
    sharding: str | None = None
    """How the step is spread over processes: ``ddp``, ``fsdp2``, or not."""
    world_size: int = 1
    """Over how many; the batch and all bytes are those of one."""
    wrap: tuple[str, ...] = ()
    """What FSDP2 shards: class names, or names of modules."""
    reshard_after_forward: bool | None = None
    """What FSDP2 is told."""
    param_dtype: str | None = None
    """In which FSDP2 gathers parameters, if not in their own."""
    reduce_dtype: str | None = None
    """In which it reduces gradients."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the planned step needs. ``overhead`` is recompute over unplanned step seconds."""

    peak_bytes: int
    peak_at: str
    resident_bytes: int
    step_seconds: float
    recompute_seconds: float
    overhead: float
    unplanned_peak_bytes: int
    unplanned_step_seconds: float
    alive_at_peak: dict[str, int]
    """Bytes alive at the peak by what they are."""


@dataclass(frozen=True, slots=True)
class SolverReport:
    """How the choice was made."""

    name: str
    status: str
    gap: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Bounds:
    """What no plan goes below, as a share of the unplanned step's seconds like the overhead."""

    regions: float
    """Of all choices that the plan's regions and options allow."""
    proved_by: str
    general: float | None
    """Of every schedule of the step's ops; null where the step is too large."""
    note: str
    """How the general one was found, or why it was not."""


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """What happens to one region: ``keep``, ``checkpoint`` or ``selective``."""

    name: str
    action: str
    keep: tuple[str, ...]
    """For ``selective``: the activations that are kept, by their names within the region."""
    stored_bytes: int
    """What the region holds from its forward to its backward."""
    freed_bytes: int
    """What it would hold more if it were kept."""
    recompute_seconds: float
    kept_because: str = ""
    """Why the region could only be kept; empty when it was a choice."""
    recompute: tuple[str, ...] = ()
    """For ``selective``: the activations that are recomputed."""
    recompute_input: tuple[str, ...] = ()
    """Inputs that are not held but made again by the region before, by their names there."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The same step without planning."""

    name: str
    peak_bytes: int
    overhead: float


@dataclass(frozen=True, slots=True)
class NearbyBudget:
    """What a budget near the plan's would take."""

    budget_bytes: int
    recompute_seconds: float | None
    """At most; null where no single changes of the plan lead there."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What other budgets would do."""

    unavoidable_bytes: int
    """Alive at once whatever is chosen: no smaller budget has a plan."""
    free_budget_bytes: int
    """From here on nothing is recomputed."""
    nearby: tuple[NearbyBudget, ...]
    """In order, between the two."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which regions recompute, and what the step then needs."""

    made_with: MadeWith
    model: Model
    workload: Workload
    budget_bytes: int
    predicted: Predicted
    solver: SolverReport
    regions: tuple[RegionPlan, ...]
    baselines: tuple[Baseline, ...] = ()
    bounds: Bounds | None = None
    sensitivity: Sensitivity | None = None
    timeline: MemoryTimeline | None = None
    """What is alive when; plans of an early memfit have none."""

    def to_json(self) -> str:
        """The plan as indented JSON, ending in a newline."""
        return json.dumps({"schema": SCHEMA} | encode(self), indent=2) + "\n"

    def recorded_timeline(self) -> MemoryTimeline:
        """What is alive when; :class:`PlanError` for a plan that does not say."""
        if self.timeline is None:
            raise PlanError(
                f"the plan was made by memfit {self.made_with.memfit} and does not say what is "
                "alive when; make it again with `memfit plan` of this version"
            )
        return self.timeline

    def save(self, path: str | Path) -> None:
        """Writes the plan; a file that is there is replaced in one step."""
        write(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan; :class:`PlanError` when it is not one, or of another schema."""
        try:
            text = read(path)
        except RecordError as error:
            raise PlanError(str(error)) from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> "Plan":
        """Inverse of :meth:`to_json`; ``source`` names the text in errors."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(
                f"{source} is not a plan: {error}; it may be truncated, write it again with "
                "`memfit plan`"
            ) from error
        schema = value.pop("schema", None) if isinstance(value, dict) else None
        if schema != SCHEMA:
            raise PlanError(
                f"{source} has schema {schema!r}, this memfit reads {SCHEMA!r}; make the plan "
                "again with `memfit plan`"
            )
        try:
            plan: Plan = decode(cls, value)
        except RecordError as error:
            raise PlanError(
                f"{source} is not a plan: {error}; make it again with `memfit plan`"
            ) from error
        for index, region in enumerate(plan.regions):
            if region.action not in ACTIONS:
                raise PlanError(
                    f"{source} is not a plan: $.regions[{index}].action is {region.action!r}, "
                    f"known are {', '.join(ACTIONS)}"
                )
        return plan
