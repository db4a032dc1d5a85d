"""A timeline as one HTML page that needs nothing else: no request, no library, no server.

The picture is drawn here; the page's script only tells what is alive at the moment that is pointed
at. Depends on the chart and on ``page.html`` beside this file.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from operator import add
from pathlib import Path
from string import Template

from memfit.integrations.pictures import in_percent
from memfit.integrations.timeline.chart import BUDGET_COLOUR, COLOURS, Chart
from memfit.planner.budget import format_bytes
from memfit.planner.peak_report import describe
from memfit.planner.timeline import AliveTensor

# Of the picture's own coordinates; the page stretches it.
_HEIGHT = 1000
_OVERLAP = 2
# Tensors that are listed before one asks for the others.
_LISTED = 20


def make_page(chart: Chart) -> str:
    """The page of ``chart``."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    texts = {
        "title": chart.title,
        "facts": " · ".join(chart.facts),
        "description": _description(chart),
        "peak_total": format_bytes(chart.peak_bytes),
        "peak_where": chart.moments[chart.peak],
        "peak_at": chart.peak_at,
        "note": chart.note,
        "made_with": f"Made by {chart.made_with}.",
    }
    return template.substitute(
        {key: escape(text) for key, text in texts.items()},
        budget_colour=BUDGET_COLOUR,
        slots=chart.slots,
        height=_HEIGHT,
        last=len(chart.columns) - 1,
        peak=chart.peak,
        figures=_figures(chart),
        axis=_axis(chart),
        grid=_grid(chart),
        areas=_areas(chart),
        marks=_marks(chart),
        tags=_tags(chart),
        phases=_phases(chart),
        legend=_legend(chart),
        tensors=_tensors(chart),
        data=_data(chart),
    )


def _description(chart: Chart) -> str:
    return (
        f"Stacked areas of the bytes alive over the {chart.slots:,} ops of a training step. The "
        f"peak is {format_bytes(chart.peak_bytes)}, in the {chart.peak_at}; the budget is "
        f"{format_bytes(chart.budget_bytes)}."
    )


def _figures(chart: Chart) -> str:
    figures = {
        "peak": format_bytes(chart.peak_bytes),
        "budget": format_bytes(chart.budget_bytes),
        "peak without a plan": format_bytes(chart.unplanned_peak_bytes),
        "time added by recomputation": f"{100 * chart.overhead:.1f} %",
    }
    return "\n".join(
        f'<div><b>{value}</b><span class="soft">{name}</span></div>'
        for name, value in figures.items()
    )


# -- the picture ---------------------------------------------------------------------------------


def _from_top(chart: Chart, size_bytes: float) -> float:
    """Where an amount of bytes is drawn, as a share of the height."""
    return 1 - size_bytes / chart.top_bytes


def _y(chart: Chart, size_bytes: float) -> str:
    return f"{_HEIGHT * _from_top(chart, size_bytes):.1f}"


def _axis(chart: Chart) -> str:
    return "".join(
        f'<span style="top:{in_percent(_from_top(chart, tick.size_bytes))}">{tick.label}</span>'
        for tick in chart.ticks
    )


def _grid(chart: Chart) -> str:
    return "\n".join(_across(chart, "grid", tick.size_bytes) for tick in chart.ticks)


def _across(chart: Chart, name: str, size_bytes: float) -> str:
    y = _y(chart, size_bytes)
    return f'<line class="{name}" x1="0" x2="{chart.slots}" y1="{y}" y2="{y}"/>'


def _areas(chart: Chart) -> str:
    """A path for each kind, the highest first."""
    below = [0] * len(chart.columns)
    paths = []
    for kind, row in chart.kinds.items():
        outline = _outline(chart, below, row)
        paths.append(f'<path fill="{COLOURS[kind]}" d="{outline}"><title>{kind}</title></path>')
        below = list(map(add, below, row))
    return "\n".join(reversed(paths))


def _outline(chart: Chart, below: Sequence[int], row: Sequence[int]) -> str:
    """Of the bytes in ``row`` that are stacked on those ``below``, where there are any."""
    columns = zip(chart.columns, below, row, strict=True)
    parts = []
    for there, group in groupby(columns, lambda column: column[2] > 0):
        if not there:
            continue
        run = list(group)
        upper = [(c.stop, _y(chart, b + size)) for c, b, size in run]
        # Reaches under what is below it, which is drawn later: no background shows in between.
        lower = [(c.start, f"{_from_top(chart, b) * _HEIGHT + _OVERLAP:.1f}") for c, b, _ in run]
        parts.append(f"M{run[0][0].start} {lower[0][1]}{_steps(upper)}{_steps(lower[::-1])}Z")
    return "".join(parts)


def _steps(points: Iterable[tuple[int, str]]) -> str:
    """Up or down to each height, and along to where it ends."""
    steps = []
    for y, group in groupby(points, lambda point: point[1]):
        *_, (x, _) = group
        steps.append(f"V{y}H{x}")
    return "".join(steps)


def _marks(chart: Chart) -> str:
    """The beginnings of phases and the budget, above the areas."""
    marks = [
        f'<line class="phase" x1="{first}" x2="{first}" y1="0" y2="{_HEIGHT}"/>'
        for first in chart.phases.values()
        if first
    ]
    if chart.budget_in_sight:
        marks.append(_across(chart, "budget", chart.budget_bytes))
    return "\n".join(marks)


def _tags(chart: Chart) -> str:
    """The labels of the peak and of the budget, on opposite sides."""
    x = chart.columns[chart.peak].middle / chart.slots
    y, right = in_percent(_from_top(chart, chart.peak_bytes)), chart.peak_is_right
    beside = (
        f"right:calc({in_percent(1 - x)} + 9px)" if right else f"left:calc({in_percent(x)} + 9px)"
    )
    side = "left" if right else "right"
    budget = f"budget {format_bytes(chart.budget_bytes)}"
    if chart.budget_in_sight:
        height = (
            f"top:{in_percent(_from_top(chart, chart.budget_bytes))};transform:translateY(-50%)"
        )
    else:
        height, budget = "top:4px", f"{budget}, far above"
    return (
        f'<span class="dot" style="left:{in_percent(x)};top:{y}"></span>'
        f'<span class="tag" style="{beside};top:calc({y} + 15px)">'
        f"peak {format_bytes(chart.peak_bytes)}</span>"
        f'<span class="tag over" style="{side}:6px;{height}">{budget}</span>'
    )


def _phases(chart: Chart) -> str:
    """Names of the phases under their beginnings; one near the end is flush with it."""
    spans = []
    for phase, first in chart.phases.items():
        x = first / chart.slots
        place = "right:0" if x > 0.7 else f"left:{in_percent(x)}"
        spans.append(f'<span style="{place}">{escape(phase)}</span>')
    return "".join(spans)


# -- beside the picture --------------------------------------------------------------------------


def _swatch(kind: str) -> str:
    return f'<span class="swatch" style="background:{COLOURS[kind]}"></span>'


def _legend(chart: Chart) -> str:
    """The kinds as they are stacked, from the top, with their bytes at the peak."""
    return "\n".join(
        f'<li>{_swatch(kind)}{kind}<span class="bytes">{format_bytes(row[chart.peak])}</span></li>'
        for kind, row in reversed(chart.kinds.items())
    )


def _tensors(chart: Chart) -> str:
    first, rest = chart.at_peak[:_LISTED], chart.at_peak[_LISTED:]
    text = _table(chart, first)
    if rest:
        number = sum(tensor.count for tensor in rest)
        total = format_bytes(sum(tensor.total_bytes for tensor in rest))
        summary = f"{number:,} smaller tensors, {total} together"
        text += f"<details><summary>{summary}</summary>{_table(chart, rest)}</details>"
    return text


def _table(chart: Chart, tensors: Iterable[AliveTensor]) -> str:
    largest = chart.at_peak[0].total_bytes
    rows = "\n".join(_row(tensor, tensor.total_bytes / largest) for tensor in tensors)
    return (
        '<table><thead><tr><th scope="col">tensor</th><th scope="col">shape and dtype</th>'
        '<th scope="col" class="number">count</th><th scope="col" class="number">each</th>'
        f'<th scope="col" class="number">all</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _row(tensor: AliveTensor, share: float) -> str:
    colour = COLOURS[tensor.kind]
    bar = f'<div class="share" style="width:{in_percent(share)};background:{colour}"></div>'
    module = f"{escape(tensor.module)}." if tensor.module else ""
    one = "" if tensor.count > 1 else " one"
    return (
        f'<tr><td class="name">{_swatch(tensor.kind)}<span class="soft">{module}</span>'
        f'<b>{escape(tensor.name)}</b><div class="soft">{tensor.kind}</div></td>'
        f"<td>{escape(describe(tensor))}</td>"
        f'<td class="number{one}">{tensor.count:,}<span class="times"> x</span></td>'
        f'<td class="number{one}">{format_bytes(tensor.size_bytes)}</td>'
        f'<td class="number"><b>{format_bytes(tensor.total_bytes)}</b>{bar}</td></tr>'
    )


def _data(chart: Chart) -> str:
    """What the script needs to tell of a moment, as JSON that cannot end its element."""
    words = {word: index for index, word in enumerate(dict.fromkeys([*chart.moments, *chart.ops]))}
    data = {
        "count": chart.slots,
        "peak": chart.peak,
        "starts": [*(column.start for column in chart.columns), chart.slots],
        "slots": [column.slot for column in chart.columns],
        "words": list(words),
        "moments": [words[moment] for moment in chart.moments],
        "ops": [words[op] for op in chart.ops],
        # As the legend lists them.
        "kinds": list(reversed(chart.kinds.values())),
    }
    return json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
