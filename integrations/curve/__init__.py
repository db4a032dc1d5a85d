"""Pictures of a trade-off curve: an HTML page, or a PNG or SVG figure.

Depends on the points that the planner finds; matplotlib, an optional extra, is imported when a
figure is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.integrations.pictures import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memfit.planner.curve import Point


def draw_curve(points: "Sequence[Point]", model: str, path: Path) -> None:
    """Draws the points of ``model`` into a file; its suffix says in what form."""

    def page() -> str:
        from memfit.integrations.curve.page import make_page

        return make_page(points, model)

    def figure() -> "Figure":
        from memfit.integrations.curve.figure import make_figure

        return make_figure(points, model)

    draw(path, page, figure)
