"""The trade-off of memory and time as a figure. Depends on matplotlib, an optional extra."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from memfit.planner.curve import PLAN, Point


def make_figure(points: Sequence[Point], model: str) -> Figure:
    """The plans of ``model`` as a line, and beside it what can be had by hand."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    planned = [point for point in points if point.name == PLAN]
    gib = [point.peak_bytes / 2**30 for point in planned]
    axes.plot(gib, [100 * p.overhead for p in planned], marker="o", label="planned")
    for point in points:
        if point.name != PLAN:
            x, y = point.peak_bytes / 2**30, 100 * point.overhead
            axes.plot([x], [y], marker="s", color="#d6403a", linestyle="")
            axes.annotate(point.name, (x, y), xytext=(5, 5), textcoords="offset points")
    axes.set_xlabel("peak of a step, GiB")
    axes.set_ylabel("recomputed, % of the unplanned step")
    axes.set_title(f"{model}: memory and time")
    axes.margins(x=0.1)  # room for the names
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
