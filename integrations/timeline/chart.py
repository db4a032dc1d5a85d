"""What the pictures of a timeline show: the moments that are drawn, the axis, colours and captions.

Depends on the plan document alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from memfit.integrations.pictures import round_step
from memfit.planner import timeline
from memfit.planner.budget import format_bytes, parse_budget
from memfit.planner.document import Plan
from memfit.planner.errors import PlanError
from memfit.planner.report import format_tensor
from memfit.planner.timeline import AliveTensor

# Moments that are drawn at most, about as many as a screen has pixels across.
COLUMNS = 1000
BUDGET_COLOUR = "#d6403a"
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        timeline.PARAMETERS: "#5f7fa3",
        timeline.OPTIMIZER: "#9db3cb",
        timeline.OTHER: "#a3a3a3",
        timeline.BATCH: "#c9bb9b",
        timeline.GATHERED: "#86c5e0",
        timeline.COLLECTIVES: "#b08968",
        timeline.GRADIENTS: "#3f9c82",
        timeline.KEPT: "#3673d9",
        timeline.LOSS: "#8d5fc9",
        timeline.RECOMPUTED: "#e9813a",
        timeline.TEMPORARIES: "#f0c24f",
        timeline.WORKSPACE: "#cf6490",
    }
)
# A budget further above the peak than this would flatten everything else.
_BUDGET_IN_SIGHT = 1.6
_HEADROOM = 1.08
_TICKS = 5


@dataclass(frozen=True, slots=True)
class Column:
    """Neighbouring slots, drawn as the one of them in which most is alive."""

    start: int
    stop: int
    slot: int

    @property
    def middle(self) -> float:
        """Half way between its ends."""
        return (self.start + self.stop) / 2


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of the axis of bytes."""

    size_bytes: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A timeline ready to be drawn; lists have one entry for each column."""

    title: str
    facts: tuple[str, ...]
    """What is trained and where."""
    slots: int
    phases: Mapping[str, int]
    """First slot of each phase."""
    columns: tuple[Column, ...]
    kinds: dict[str, Sequence[int]]
    """Bytes by what they are, in the order in which they are stacked."""
    moments: Sequence[str]
    ops: Sequence[str]
    totals: Sequence[int]
    peak: int
    """Column of the peak."""
    peak_at: str
    budget_bytes: int
    unplanned_peak_bytes: int
    overhead: float
    top_bytes: float
    """Upper end of the axis."""
    ticks: tuple[Tick, ...]
    at_peak: tuple[AliveTensor, ...]
    made_with: str

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once."""
        return self.totals[self.peak]

    @property
    def peak_is_right(self) -> bool:
        """Whether the peak is in the right half, so that its label has room on the left."""
        return 2 * self.columns[self.peak].middle > self.slots

    @property
    def budget_in_sight(self) -> bool:
        """Whether the line of the budget is within the axis."""
        return self.budget_bytes <= self.top_bytes

    @property
    def note(self) -> str:
        """What one column of the picture is."""
        if len(self.columns) == self.slots:
            return f"Each step from left to right is one of the {self.slots:,} ops that run."
        return (
            f"{self.slots:,} ops run; of neighbouring ones that share a column, the moment with "
            "the most bytes is drawn."
        )


def make_chart(plan: Plan) -> Chart:
    """What is drawn of ``plan``; :class:`PlanError` when it has no timeline that can be read."""
    recorded = plan.recorded_timeline()
    by_kind = recorded.bytes_by_kind()
    totals = [sum(column) for column in zip(*by_kind.values(), strict=True)]
    _check(plan, max(totals, default=0))
    columns = thin(totals, COLUMNS)
    drawn = [column.slot for column in columns]
    moments, ops = recorded.moment_of_slots(), recorded.op_of_slots()
    peak_bytes = max(totals)
    near = plan.budget_bytes <= _BUDGET_IN_SIGHT * peak_bytes
    top_bytes = _HEADROOM * (max(peak_bytes, plan.budget_bytes) if near else peak_bytes)
    return Chart(
        title=f"{plan.model.class_}: memory of a training step",
        facts=_facts(plan),
        slots=recorded.slots,
        phases=recorded.phases,
        columns=columns,
        kinds={kind: [row[slot] for slot in drawn] for kind, row in by_kind.items()},
        moments=[moments[slot] for slot in drawn],
        ops=[ops[slot] for slot in drawn],
        totals=[totals[slot] for slot in drawn],
        peak=drawn.index(totals.index(peak_bytes)),
        peak_at=plan.predicted.peak_at,
        budget_bytes=plan.budget_bytes,
        unplanned_peak_bytes=plan.predicted.unplanned_peak_bytes,
        overhead=plan.predicted.overhead,
        top_bytes=top_bytes,
        ticks=ticks(top_bytes),
        at_peak=recorded.at_peak,
        made_with=f"memfit {plan.made_with.memfit}, torch {plan.made_with.torch}",
    )


def _check(plan: Plan, peak_bytes: int) -> None:
    """Refuses a timeline of another memfit, or one that is not of the plan that it is in."""
    recorded = plan.recorded_timeline()
    kinds = {*recorded.kinds, *(tensor.kind for tensor in recorded.at_peak)}
    if unknown := sorted(kinds - set(COLOURS)):
        raise PlanError(
            f"the plan's timeline has bytes of an unknown kind, {unknown[0]!r}; draw it with the "
            f"memfit that made it, {plan.made_with.memfit}"
        )
    named_bytes = sum(tensor.total_bytes for tensor in recorded.at_peak)
    if not 0 < plan.predicted.peak_bytes == peak_bytes == named_bytes:
        raise PlanError(
            f"the plan peaks at {plan.predicted.peak_bytes} bytes, its timeline at {peak_bytes} "
            f"with tensors of {named_bytes}; make it again with `memfit plan`"
        )


def thin(totals: Sequence[int], limit: int) -> tuple[Column, ...]:
    """At most ``limit`` columns over all slots; of each the first slot in which most is alive."""
    count = min(limit, len(totals))
    edges = [i * len(totals) // count for i in range(count + 1)]
    return tuple(Column(a, b, max(range(a, b), key=totals.__getitem__)) for a, b in pairwise(edges))


def ticks(top_bytes: float) -> tuple[Tick, ...]:
    """Round amounts from zero up to ``top_bytes``, in the unit that suits it."""
    name = format_bytes(int(top_bytes)).split()[1]
    unit = parse_budget(f"1{name}")
    step = round_step(top_bytes / unit, _TICKS)
    marks = range(int(top_bytes / unit / step) + 1)
    return tuple(Tick(i * step * unit, f"{i * step:g} {name}" if i else "0") for i in marks)


def _facts(plan: Plan) -> tuple[str, ...]:
    work = plan.workload
    batch = (f"{name} {format_tensor(spec.shape, spec.dtype)}" for name, spec in work.batch.items())
    return (
        f"{plan.model.parameters:,} parameters",
        ", ".join(batch),
        work.optimizer or "no optimizer step",
        work.device,
    )
