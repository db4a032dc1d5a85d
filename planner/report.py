"""The readable table of a plan, for terminals and logs.

Everything in it comes from the plan's record, so that a plan can be shown where torch is not
installed. Depends on the plan document, on the formatting of bytes and on the standard library.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence

from memfit.planner.budget import exact_bytes, format_bytes
from memfit.planner.document import Plan, RegionPlan, TensorSpec, Workload

WIDTH = 80
_LABEL_WIDTH = 12
_NOTHING = "-"
OVER = "over the budget"
_NO_BREAK = "\N{NO-BREAK SPACE}"

# A whole part of a dotted name: the 0 of "h.0.mlp.fc1", not the 1 of its fc1.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_BASELINE_NAMES = {"none": "unplanned", "full": "full checkpointing"}


def format_plan(plan: Plan) -> str:
    """``plan`` for people: what it is for, where it peaks, what each region does, what it costs."""
    blocks = (_facts(plan), _regions(plan.regions), _comparison(plan), _notes(plan))
    return "\n\n".join(block for block in blocks if block) + "\n"


def format_seconds(seconds: float) -> str:
    """``seconds`` with three significant digits, such as ``1.23 s``, ``34.0 ms`` or ``5.60 us``."""
    if seconds == 0:
        return "0 s"
    value, unit = seconds, "s"
    for smaller in ("ms", "us"):
        # 0.9995 and more would round to four digits in the smaller unit.
        if abs(value) >= 0.9995:
            break
        value, unit = value * 1000, smaller
    digits = f"{value:.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")
    return f"{digits} {unit}"


def format_tensor(shape: tuple[int, ...], dtype: str) -> str:
    """Shape and dtype such as ``8 x 2048 int64``."""
    return f"{' x '.join(map(str, shape)) or 'scalar'} {dtype}"


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """One line a row; the first ``left`` columns are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# -- what is planned -----------------------------------------------------------------------------


def _facts(plan: Plan) -> str:
    facts = {
        "model": _model(plan),
        "batch": _listed(_tensor(name, spec) for name, spec in plan.workload.batch.items()),
        "autocast": plan.workload.autocast or "",
        "optimizer": plan.workload.optimizer or "none: forward and backward only",
        "device": f"{plan.workload.device}, times: {plan.workload.costs}",
        "processes": _processes(plan.workload),
        "budget": exact_bytes(plan.budget_bytes),
        "peak": _peak(plan),
        "alive there": _listed(
            f"{kind} {format_bytes(size)}" for kind, size in plan.predicted.alive_at_peak.items()
        ),
        "overhead": _overhead(plan),
        "solver": _solver(plan),
        "bound": _bound(plan),
    }
    return "\n".join(
        wrapped(f"{label:{_LABEL_WIDTH}}", text) for label, text in facts.items() if text
    )


def _model(plan: Plan) -> str:
    model = plan.model
    text = f"{model.class_}, {model.parameters:,} parameters"
    if model.trainable_parameters != model.parameters:
        text += f", {model.trainable_parameters:,} trainable"
    return text


def _tensor(name: str, spec: TensorSpec) -> str:
    return f"{name} {format_tensor(spec.shape, spec.dtype)}"


def _processes(workload: Workload) -> str:
    """Empty for one."""
    if workload.sharding is None:
        return ""
    layers = f" of {', '.join(workload.wrap)}" if workload.wrap else ""
    layers += f" in {workload.param_dtype}" if workload.param_dtype else ""
    return (
        f"{workload.world_size}, {workload.sharding}{layers}; all figures are of one, without the "
        "seconds of communication"
    )


def _peak(plan: Plan) -> str:
    predicted = plan.predicted
    share = predicted.peak_bytes / max(1, plan.budget_bytes)
    return (
        f"{format_bytes(predicted.peak_bytes)}, {percent(share)} of the budget, "
        f"in the {predicted.peak_at}"
    )


def _overhead(plan: Plan) -> str:
    predicted = plan.predicted
    return (
        f"{percent(predicted.overhead)}: recomputes for "
        f"{format_seconds(predicted.recompute_seconds)} in a step of "
        f"{format_seconds(predicted.step_seconds)}"
    )


def _solver(plan: Plan) -> str:
    solver = plan.solver
    return (
        f"{solver.name}: {solver.status}, gap {percent(solver.gap)}, "
        f"{format_seconds(solver.seconds)}"
    )


def _bound(plan: Plan) -> str:
    bounds = plan.bounds
    if bounds is None:
        return ""
    text = (
        f"no plan of these regions has less than {percent(bounds.regions)} of overhead "
        f"({bounds.proved_by})"
    )
    if bounds.general is None:
        return f"{text}; {bounds.note}"
    return f"{text}, and no schedule of any kind less than {percent(bounds.general)}"


# -- what is done --------------------------------------------------------------------------------


def _regions(regions: Sequence[RegionPlan]) -> str:
    if not regions:
        return "no regions: nothing in this step can be recomputed"
    groups = grouped(regions)
    head, *rows = columns(
        [("region", "action", "stored", "freed", "recompute"), *map(_region_cells, groups)],
        left=2,
    )
    lines = [head]
    for group, row in zip(groups, rows, strict=True):
        lines.append(row)
        first = group[0]
        if first.kept_because:
            lines.append(wrapped("  kept: ", first.kept_because))
        if first.keep or first.recompute:
            lines.append(wrapped("  keep: ", ", ".join(first.keep) or "nothing"))
            lines.append(wrapped("  recompute: ", ", ".join(first.recompute)))
        if first.recompute_input:
            made = ", ".join(first.recompute_input)
            lines.append(wrapped("  input: ", f"made again by the region before ({made})"))
    return "\n".join(lines)


def grouped(regions: Iterable[RegionPlan]) -> list[list[RegionPlan]]:
    """Regions that are numbered one after the other and treated alike, together.

    Series that take turns (``0.attention``, ``0.mlp``, ``1.attention``, ...) are told apart.
    """
    groups: list[list[RegionPlan]] = []
    open_groups: dict[str, list[RegionPlan]] = {}
    for region in regions:
        pattern, _ = _split_name(region.name)
        group = open_groups.get(pattern)
        if group and _continues(group[-1], region):
            group.append(region)
        else:
            open_groups[pattern] = [region]
            groups.append(open_groups[pattern])
    return groups


def _split_name(name: str) -> tuple[str, int]:
    """``name`` with a star for its last number, and that number."""
    numbers = list(_NUMBER.finditer(name))
    if not numbers:
        return name, 0
    last = numbers[-1]
    return f"{name[: last.start()]}*{name[last.end() :]}", int(last[0])


def _continues(last: RegionPlan, region: RegionPlan) -> bool:
    treated_alike = _treatment(last) == _treatment(region)
    # A module that is called twice is two regions of one name.
    return treated_alike and _split_name(region.name)[1] - _split_name(last.name)[1] in (0, 1)


def _treatment(region: RegionPlan) -> tuple[object, ...]:
    what = region.keep, region.recompute, region.recompute_input
    return region.action, region.kept_because, *what


def _region_cells(group: Sequence[RegionPlan]) -> tuple[str, ...]:
    freed = sum(region.freed_bytes for region in group)
    seconds = sum(region.recompute_seconds for region in group)
    return (
        group_label(group),
        group[0].action,
        format_bytes(sum(region.stored_bytes for region in group)),
        format_bytes(freed) if freed else _NOTHING,
        format_seconds(seconds) if seconds else _NOTHING,
    )


def group_label(group: Sequence[RegionPlan]) -> str:
    pattern, first = _split_name(group[0].name)
    _, last = _split_name(group[-1].name)
    if first != last:
        return pattern.replace("*", f"{first}-{last}")
    return group[0].name if len(group) == 1 else f"{group[0].name} (x{len(group)})"


# -- what it costs -------------------------------------------------------------------------------


def _comparison(plan: Plan) -> str:
    """The plan beside what can be had without one."""
    predicted = plan.predicted
    rows = [("unplanned", predicted.unplanned_peak_bytes, 0.0)]
    rows += [
        (_BASELINE_NAMES.get(b.name, b.name), b.peak_bytes, b.overhead)
        for b in plan.baselines
        if b.name != "none"
    ]
    rows.append(("this plan", predicted.peak_bytes, predicted.overhead))
    cells = [
        (
            name,
            format_bytes(peak_bytes),
            percent(overhead),
            format_seconds(predicted.unplanned_step_seconds * (1 + overhead)),
            OVER if peak_bytes > plan.budget_bytes else "",
        )
        for name, peak_bytes, overhead in rows
    ]
    return "\n".join(columns([("", "peak", "overhead", "step", ""), *cells]))


def _notes(plan: Plan) -> str:
    return "\n".join(wrapped("note: ", note) for note in plan.workload.notes)


# -- layout --------------------------------------------------------------------------------------


def _listed(items: Iterable[str]) -> str:
    """``items`` with commas; lines break between them only."""
    return ", ".join(item.replace(" ", _NO_BREAK) for item in items)


def wrapped(label: str, text: str) -> str:
    """``text`` behind ``label``, its further lines indented as far."""
    filled = textwrap.fill(
        text,
        WIDTH,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace(_NO_BREAK, " ")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
