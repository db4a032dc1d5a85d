"""A trade-off curve as one HTML page that needs nothing else: no request, no library, no server.

The picture is drawn here; the page's script only says which point is nearest to the pointer.
Depends on the points and on ``page.html`` beside this file.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from memfit.integrations.pictures import in_percent, round_step
from memfit.planner.budget import format_bytes
from memfit.planner.curve import PLAN, Point
from memfit.planner.report import format_seconds, percent

# Of the picture's own coordinates; the page stretches it.
_SIZE = 1000
# Left free around the points, as a share of what they span.
_MARGIN = 0.06
_STEPS = 5


class _Scale:
    """Where numbers are drawn, as a share of the picture."""

    def __init__(self, lowest: float, highest: float) -> None:
        margin = _MARGIN * (highest - lowest) or max(highest, 1.0) * _MARGIN
        self._lowest, self._span = lowest - margin, highest - lowest + 2 * margin

    def __call__(self, number: float) -> float:
        return (number - self._lowest) / self._span


def make_page(points: Sequence[Point], model: str) -> str:
    """The page of the points of ``model``: plans as a line, beside it what is had by hand."""
    across = _Scale(min(p.peak_bytes for p in points), max(p.peak_bytes for p in points))
    up = _Scale(0.0, max(p.overhead for p in points))
    marks = _marks(max(p.overhead for p in points))
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{model}: memory and time"),
        size=_SIZE,
        line=_line(points, across, up),
        grid=_grid(marks, up),
        axis=_axis(marks, up),
        peaks=_peaks(points, across),
        dots=_dots(points, across, up),
        rows="\n".join(map(_row, points)),
    )


def _line(points: Sequence[Point], across: _Scale, up: _Scale) -> str:
    planned = sorted((p for p in points if p.name == PLAN), key=lambda p: p.peak_bytes)
    places = (
        f"{_SIZE * across(p.peak_bytes):.1f},{_SIZE * (1 - up(p.overhead)):.1f}" for p in planned
    )
    return " ".join(places)


def _marks(highest: float) -> list[float]:
    """Round overheads up to the highest."""
    if not highest:
        return [0.0]
    step = round_step(highest, _STEPS)
    return [step * n for n in range(int(highest / step + 1e-9) + 1)]


def _grid(marks: Sequence[float], up: _Scale) -> str:
    heights = (f"{_SIZE * (1 - up(share)):.1f}" for share in marks)
    return "\n".join(f'<line class="grid" x1="0" x2="{_SIZE}" y1="{y}" y2="{y}"/>' for y in heights)


def _axis(marks: Sequence[float], up: _Scale) -> str:
    return "".join(
        f'<span style="top:{in_percent(1 - up(share))}">{100 * share:.3g} %</span>'
        for share in marks
    )


def _peaks(points: Sequence[Point], across: _Scale) -> str:
    """The lowest, the middle and the highest peak."""
    peaks = [point.peak_bytes for point in points]
    marks = sorted({min(peaks), (min(peaks) + max(peaks)) // 2, max(peaks)})
    return "".join(
        f'<span style="left:{in_percent(across(mark))}">{format_bytes(mark)}</span>'
        for mark in marks
    )


def _dots(points: Sequence[Point], across: _Scale, up: _Scale) -> str:
    """Plans first: what is had by hand is drawn above them."""
    return "\n".join(
        f'<button class="dot {"planned" if p.name == PLAN else "by-hand"}" '
        f'style="left:{in_percent(across(p.peak_bytes))};top:{in_percent(1 - up(p.overhead))}" '
        f'aria-label="{escape(_told(p))}"></button>'
        + ("" if p.name == PLAN else _name(p, across, up))
        for p in points
    )


def _name(point: Point, across: _Scale, up: _Scale) -> str:
    """The name of what is had by hand: beside it, or above where that would leave the picture."""
    x, top = across(point.peak_bytes), in_percent(1 - up(point.overhead))
    place = f"left:calc({in_percent(x)} + 9px)"
    if x > 0.7:
        place = f"right:{in_percent(1 - x)};transform:translateY(-150%)"
    return f'<span class="tag" style="{place};top:{top}">{escape(point.name)}</span>'


def _told(point: Point) -> str:
    """What is said of a point."""
    return (
        f"{point.name}: peak {format_bytes(point.peak_bytes)}, overhead "
        f"{percent(point.overhead)}, step {format_seconds(point.step_seconds)}"
    )


def _row(point: Point) -> str:
    cells = (
        format_bytes(point.budget_bytes),
        format_bytes(point.peak_bytes),
        percent(point.overhead),
        format_seconds(point.step_seconds),
    )
    numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
    return f'<tr><th scope="row">{escape(point.name)}</th>{numbers}</tr>'
