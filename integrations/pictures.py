"""Picture files: which there are, and how a figure of matplotlib becomes one.

Depends on matplotlib, an optional extra, which is imported when a figure is made.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.planner.errors import MemfitError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (".png", ".svg")
PAGES = (".html", ".htm")
_DOTS_PER_INCH = 150


class PictureError(MemfitError, ValueError):
    """A picture that cannot be drawn."""


def check_picture(path: Path) -> None:
    """Refuses a file name that does not say what is to be drawn."""
    if path.suffix.lower() not in (*FIGURES, *PAGES):
        raise PictureError(f"cannot draw {path}: name a file that ends in .html, .png or .svg")


def check_figure(path: Path, way_out: str) -> None:
    """Refuses a figure where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise PictureError(
            f"cannot draw {path} without {error.name}: `pip install 'memfit[plot]'`, or {way_out}"
        ) from error


def save_figure(make: Callable[[], "Figure"], path: Path) -> None:
    """Makes a figure and writes it; equal figures give equal bytes."""
    import matplotlib

    # An SVG keeps its text as text and has no random ids; a dollar sign is one.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "memfit", "text.parse_math": False}
    ):
        svg = path.suffix.lower() == ".svg"
        make().savefig(path, dpi=_DOTS_PER_INCH, metadata={"Date": None} if svg else None)
