"""The plan as frozen data, and its JSON form. Attributes are named as the JSON keys.

``Plan.save`` and ``Plan.load`` are exact inverses; reading checks every key and type and names the
offending one. Python keywords get a trailing underscore (``plan.model.class_``). Depends on nothing
but the standard library, so that a plan can be shown without importing torch.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfit.planner.errors import PlanError

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


@dataclass(frozen=True, slots=True)
class Baseline:
    """The same step without planning."""

    name: str
    peak_bytes: int
    overhead: float


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

    def to_json(self) -> str:
        """The plan as indented JSON, ending in a newline."""
        return json.dumps({"schema": SCHEMA} | _encode(self), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the plan; a file that is there is replaced in one step."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan; :class:`PlanError` when it is not one, or of another schema."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read {path}: {_reason(error)}") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> "Plan":
        """Inverse of :meth:`to_json`; ``source`` names the text in errors."""
        try:
            value = json.loads(text)
        except ValueError as error:
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
        plan: Plan = _decode(cls, value, "$", source)
        for index, region in enumerate(plan.regions):
            if region.action not in ACTIONS:
                raise PlanError(
                    f"{source} is not a plan: $.regions[{index}].action is {region.action!r}, "
                    f"known are {', '.join(ACTIONS)}"
                )
        return plan


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            f.name.rstrip("_"): _encode(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _decode(kind: Any, value: Any, where: str, source: str) -> Any:
    """``value`` as ``kind``; errors name the place in the JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, value, where, source)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], v, f"{where}[{i}]", source) for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _decode(arguments[1], v, f"{where}.{k}", source) for k, v in value.items()}
    if origin is types.UnionType:
        if value is None:
            return None
        return _decode(arguments[0], value, where, source)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise PlanError(
        f"{source} is not a plan: {where} is {json.dumps(value)[:60]}, expected {_name(kind)}; "
        "make it again with `memfit plan`"
    )


def _decode_record(kind: Any, value: Any, where: str, source: str) -> Any:
    if not isinstance(value, dict):
        raise PlanError(f"{source} is not a plan: {where} is not an object")
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        key = field.name.rstrip("_")
        if key in value:
            found[field.name] = _decode(hints[field.name], value[key], f"{where}.{key}", source)
        elif field.default is dataclasses.MISSING:
            raise PlanError(
                f"{source} is not a plan: {where}.{key} is missing; make it again with "
                "`memfit plan`"
            )
    return kind(**found)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
