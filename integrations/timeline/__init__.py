"""Pictures of a plan's timeline: an HTML page, or a PNG or SVG figure.

Depends on the plan document; matplotlib, an optional extra, is imported when a figure is drawn.
"""

from pathlib import Path

from memfit.integrations.pictures import PAGES, check_figure, check_picture, save_figure
from memfit.integrations.timeline.chart import make_chart
from memfit.integrations.timeline.page import make_page
from memfit.planner.document import Plan
from memfit.solvers.records import write


def draw_timeline(plan: Plan, path: Path) -> None:
    """Draws what is alive over the step of ``plan`` into a file; its suffix says in what form.

    Raises :class:`PictureError` for an unknown suffix or where matplotlib is missing, and
    :class:`PlanError` for a plan that has no timeline.
    """
    check_picture(path)
    chart = make_chart(plan)
    if path.suffix.lower() in PAGES:
        write(path, make_page(chart))
        return
    check_figure(path, "name an .html file, which needs nothing")
    from memfit.integrations.timeline.figure import make_figure

    save_figure(lambda: make_figure(chart), path)
