"""What a terminal takes and a pipe does not: colour, and lines that are written over.

Depends on the standard library alone.
"""

import os
from typing import TextIO

_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that can go back to the start of a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def red(text: str, stream: TextIO) -> str:
    """``text`` in red where ``stream`` is a terminal and ``NO_COLOR`` is not set (no-color.org)."""
    if os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    return f"{_RED}{text}{_PLAIN}"


def width(stream: TextIO) -> int:
    """Columns of a terminal; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
