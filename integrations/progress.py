"""What a command tells people on stderr while it works: what takes long, and how long it took.

A terminal shows one line, written over as the seconds pass and gone at the end; where stderr is no
terminal nothing is said. Depends on the terminal.
"""

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from memfit.integrations.terminal import is_terminal, width

# A part of the work is announced once it has lasted this long.
_PATIENCE_SECONDS = 1.0
_REFRESH_SECONDS = 0.2
_SPINNER = "|/-\\"
# Back to the start of the line, and nothing on it.
_CLEARED = "\r\x1b[K"


class Progress:
    """Is told what begins, says so while it lasts, and times it.

    Times are of this process's CPU, which another one that is busy does not add to.
    """

    def __init__(self, quiet: bool) -> None:
        self._stream = None if quiet or not is_terminal(sys.stderr) else sys.stderr
        self._line: _Line | None = None
        self._started: list[tuple[str, float]] = []

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._started.append(("", time.process_time()))

    def begin(self, text: str) -> None:
        """A part of the work begins; the one before is done."""
        self._stop()
        self._started.append((text, time.process_time()))
        if self._stream is not None:
            self._line = _Line(text, self._stream)

    def timings(self) -> str:
        """A line for each part of the work, once all are done."""
        ends = [at for _, at in self._started[1:]]
        parts = [(text, end - at) for (text, at), end in zip(self._started, ends, strict=False)]
        parts.append(("all of it", sum(seconds for _, seconds in parts)))
        return "".join(f"{seconds:8.2f} s of CPU  {text}\n" for text, seconds in parts)

    def _stop(self) -> None:
        if self._line is not None:
            self._line.end()
            self._line = None


class _Line:
    """The line of one part of the work."""

    def __init__(self, text: str, stream: TextIO) -> None:
        self._text = text
        self._stream = stream
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Takes the line away; what is written next does not run into it."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        started, turn = time.monotonic(), 0
        if self._ended.wait(_PATIENCE_SECONDS):
            return
        while True:
            seconds = time.monotonic() - started
            line = f"{_SPINNER[turn % len(_SPINNER)]} memfit: {self._text} ... {seconds:.0f} s"
            self._write(_CLEARED + line[: width(self._stream) - 1])
            turn += 1
            if self._ended.wait(_REFRESH_SECONDS):
                break
        self._write(_CLEARED)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@contextmanager
def hushed(debug: bool) -> Iterator[None]:
    """Keeps warnings and logs of libraries off stderr, and whatever they print off stdout."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
