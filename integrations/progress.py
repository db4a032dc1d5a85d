"""What a command tells people on stderr while it works: what takes long, and how long it took.

Depends on the standard library alone.
"""

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

# A part of the work is announced once it has lasted this long.
_PATIENCE_SECONDS = 1.0


class Progress:
    """Is told what begins, says so once it has lasted for a while, and times it.

    Times are of this process's CPU, which another one that is busy does not add to.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._timer: threading.Timer | None = None
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
        if not self._quiet:
            self._timer = threading.Timer(_PATIENCE_SECONDS, _say, (f"memfit: {text} ...",))
            self._timer.daemon = True
            self._timer.start()

    def timings(self) -> str:
        """A line for each part of the work, once all are done."""
        ends = [at for _, at in self._started[1:]]
        parts = [(text, end - at) for (text, at), end in zip(self._started, ends, strict=False)]
        parts.append(("all of it", sum(seconds for _, seconds in parts)))
        return "".join(f"{seconds:8.2f} s of CPU  {text}\n" for text, seconds in parts)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # a line that is being written does not run into the next output
            self._timer = None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
