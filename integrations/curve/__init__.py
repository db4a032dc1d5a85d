"""Pictures of a trade-off curve: an HTML page, or a PNG or SVG figure.

Depends on the points that the planner finds; matplotlib, an optional extra, is imported when a
figure is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.integrations.pictures import PAGES, check_figure, check_picture, save_figure
from memfit.solvers.records import write

if TYPE_CHECKING:
    from memfit.planner.curve import Point


def check_plot(path: Path) -> None:
    """Refuses a file that cannot be drawn into, before there are points."""
    check_picture(path)
    if path.suffix.lower() not in PAGES:
        check_figure(path, "name an .html file, which needs nothing")


def draw_curve(points: "Sequence[Point]", model: str, path: Path) -> None:
    """Draws the points of ``model`` into a file; its suffix says in what form."""
    if path.suffix.lower() in PAGES:
        from memfit.integrations.curve.page import make_page

        write(path, make_page(points, model))
        return
    from memfit.integrations.curve.figure import make_figure

    save_figure(lambda: make_figure(points, model), path)
