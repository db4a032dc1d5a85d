"""A timeline as a PNG or SVG figure. Depends on the chart and on matplotlib, an optional extra."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from memfit.integrations.timeline.chart import BUDGET_COLOUR, COLOURS, Chart
from memfit.planner.budget import format_bytes
from memfit.planner.peak_report import describe

_INCHES = (11.0, 7.6)
_SOFT = "#5c6875"
_BOX = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "#dfe3e8"}
# Tensors that are listed below the picture.
_LISTED = 8
_LETTERS = 85


def make_figure(chart: Chart) -> Figure:
    """The areas, the budget and the peak; below them the kinds and the tensors at the peak."""
    figure = Figure(figsize=_INCHES, facecolor="white")
    axes = figure.add_axes((0.085, 0.4, 0.885, 0.49))
    figure.text(0.03, 0.955, chart.title, fontsize=15, weight="bold")
    figure.text(0.03, 0.922, ", ".join(chart.facts), fontsize=9, color=_SOFT)
    _draw_areas(axes, chart)
    _draw_phases(axes, chart)
    _draw_budget(axes, chart)
    _draw_peak(axes, chart)
    _draw_legend(figure, chart)
    _draw_tensors(figure, chart)
    figure.text(0.03, 0.02, f"{chart.note} {chart.made_with}", fontsize=8, color=_SOFT)
    return figure


def _draw_areas(axes: Axes, chart: Chart) -> None:
    edges = [*(column.start for column in chart.columns), chart.slots]
    # Each moment lasts until the next begins, the last one until the end.
    rows = [[*row, row[-1]] for row in chart.kinds.values()]
    colours = [COLOURS[kind] for kind in chart.kinds]
    axes.stackplot(edges, rows, colors=colours, step="post", linewidth=0)
    axes.set_xlim(0, chart.slots)
    axes.set_ylim(0, chart.top_bytes)
    axes.set_yticks([t.size_bytes for t in chart.ticks], [t.label for t in chart.ticks])
    axes.tick_params(labelsize=9, length=0, colors=_SOFT)
    axes.grid(axis="y", color="#dfe3e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_phases(axes: Axes, chart: Chart) -> None:
    axes.set_xticks([])
    for phase, first in chart.phases.items():
        if first:
            axes.axvline(first, color="#1b2430", linewidth=0.8, alpha=0.4)
        at_end = first > 0.7 * chart.slots
        axes.annotate(
            phase,
            (chart.slots if at_end else first, 0),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right" if at_end else "left",
            fontsize=9,
            color=_SOFT,
        )


def _draw_budget(axes: Axes, chart: Chart) -> None:
    text = f"budget {format_bytes(chart.budget_bytes)}"
    height = chart.budget_bytes
    if chart.budget_in_sight:
        axes.axhline(height, color=BUDGET_COLOUR, linestyle=(0, (5, 3)), linewidth=1.6)
    else:
        text, height = f"{text}, far above", int(chart.top_bytes)
    right = not chart.peak_is_right
    axes.annotate(
        text,
        (chart.slots if right else 0, height),
        xytext=(-6 if right else 6, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        fontsize=9,
        color=BUDGET_COLOUR,
        weight="bold",
        bbox=_BOX,
    )


def _draw_peak(axes: Axes, chart: Chart) -> None:
    x = chart.columns[chart.peak].middle
    axes.plot([x], [chart.peak_bytes], "o", color="white", markeredgecolor="#1b2430", mew=2.2, ms=7)
    axes.annotate(
        f"peak {format_bytes(chart.peak_bytes)}\n{chart.peak_at}",
        (x, chart.peak_bytes),
        xytext=(-10 if chart.peak_is_right else 10, -10),
        textcoords="offset points",
        ha="right" if chart.peak_is_right else "left",
        va="top",
        fontsize=9,
        bbox=_BOX,
    )


def _draw_legend(figure: Figure, chart: Chart) -> None:
    """The kinds as they are stacked, from the top, with their bytes at the peak."""
    kinds = list(reversed(chart.kinds.items()))
    figure.legend(
        handles=[Patch(color=COLOURS[kind]) for kind, _ in kinds],
        labels=[f"{kind}: {format_bytes(row[chart.peak])}" for kind, row in kinds],
        title="at the peak",
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(0.022, 0.345),
        frameon=False,
        fontsize=9,
        title_fontproperties={"size": 9, "weight": "bold"},
    )


def _draw_tensors(figure: Figure, chart: Chart) -> None:
    figure.text(0.295, 0.32, "largest tensors there", fontsize=9, weight="bold")
    for row, tensor in enumerate(chart.at_peak[:_LISTED]):
        y = 0.292 - row * 0.03
        text = f"{tensor.path}  ({describe(tensor)})"
        cells = (
            (0.345, format_bytes(tensor.total_bytes), "right"),
            (0.455, f"{tensor.count:,} x {format_bytes(tensor.size_bytes)}", "right"),
            (0.47, text if len(text) <= _LETTERS else f"...{text[-_LETTERS:]}", "left"),
        )
        for x, text, side in cells:
            figure.text(x, y, text, fontsize=8, ha=side)
