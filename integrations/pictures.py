"""What pictures share: the files that there are, how they are written, round marks of an axis.

Depends on matplotlib, an optional extra, which is imported when a figure is made.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.planner.errors import MemfitError
from memfit.solvers.records import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURES = (".png", ".svg")
_PAGES = (".html", ".htm")
_DOTS_PER_INCH = 150


class PictureError(MemfitError, ValueError):
    """A picture that cannot be drawn."""


def check_picture(path: Path) -> None:
    """Refuses a name that does not say what is to be drawn, and a figure without matplotlib."""
    if path.suffix.lower() in _PAGES:
        return
    if path.suffix.lower() not in _FIGURES:
        raise PictureError(f"cannot draw {path}: name a file that ends in .html, .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise PictureError(
            f"cannot draw {path} without {error.name}: `pip install 'memfit[plot]'`, or name an "
            ".html file, which needs nothing"
        ) from error


def draw(path: Path, make_page: Callable[[], str], make_figure: Callable[[], "Figure"]) -> None:
    """Writes what the suffix of ``path`` asks for; equal figures give equal bytes."""
    check_picture(path)
    if path.suffix.lower() in _PAGES:
        write(path, make_page())
        return
    import matplotlib

    # An SVG keeps its text as text and has no random ids; a dollar sign is one.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "memfit", "text.parse_math": False}
    ):
        svg = path.suffix.lower() == ".svg"
        make_figure().savefig(path, dpi=_DOTS_PER_INCH, metadata={"Date": None} if svg else None)


def round_step(highest: float, marks: int) -> float:
    """A round step, of which at most ``marks`` lead from zero to ``highest``, which is above it."""
    rough = highest / marks
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough)


def in_percent(share: float) -> str:
    """A place or a length on a page, in its style sheet's unit."""
    return f"{100 * share:.2f}%"
