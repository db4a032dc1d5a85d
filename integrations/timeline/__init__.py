"""Pictures of a plan's timeline: an HTML page, or a PNG or SVG figure.

Depends on the plan document; matplotlib, an optional extra, is imported when a figure is drawn.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from memfit.integrations.pictures import check_picture, draw
from memfit.integrations.timeline.chart import make_chart
from memfit.integrations.timeline.page import make_page
from memfit.planner.document import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_timeline(plan: Plan, path: Path) -> None:
    """Draws what is alive over the step of ``plan`` into a file; its suffix says in what form.

    Raises :class:`PictureError` for an unknown suffix or where matplotlib is missing, and
    :class:`PlanError` for a plan that has no timeline.
    """
    check_picture(path)
    chart = make_chart(plan)

    def figure() -> "Figure":
        from memfit.integrations.timeline.figure import make_figure

        return make_figure(chart)

    draw(path, lambda: make_page(chart), figure)
