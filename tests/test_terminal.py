"""What a terminal is shown beside the output, and that NO_COLOR and pipes are spared."""

import io
import os
import pty
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from memfit.integrations import cli, progress
from memfit.integrations.terminal import is_terminal, red, width


class Terminal:
    """A stream that is a terminal, and what was written to it."""

    def __init__(self) -> None:
        self._main, side = pty.openpty()
        self.stream: TextIO = os.fdopen(side, "w", encoding="utf-8")
        self._read: list[bytes] = []
        self._reader = threading.Thread(target=self._collect)
        self._reader.start()

    def _collect(self) -> None:
        try:
            while data := os.read(self._main, 4096):
                self._read.append(data)
        except OSError:  # how Linux says that the other side is closed
            pass

    def text(self) -> str:
        self.stream.close()
        self._reader.join()
        os.close(self._main)
        return b"".join(self._read).decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def wait_for(happened: Callable[[], bool]) -> None:
    assert any(happened() or threading.Event().wait(0.01) for _ in range(1000))


def test_one_line_is_written_over_and_taken_away(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", terminal.stream)
    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_REFRESH_SECONDS", 0.001)
    with progress.Progress(quiet=False) as shown:
        shown.begin("thinking")
        wait_for(lambda: b"/ memfit: thinking" in b"".join(terminal._read))
        shown.begin("solving " + 200 * "x")
        wait_for(lambda: b"solving" in b"".join(terminal._read))
    text = terminal.text()
    assert "\n" not in text
    lines = text.split("\r\x1b[K")
    assert lines[0] == "" and lines[1] == "| memfit: thinking ... 0 s"
    assert lines[-1] == "", "it is gone at the end"
    assert max(map(len, lines)) == 79, "and never wraps"


def test_what_does_not_last_is_not_shown(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", terminal.stream)
    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", 3600.0)
    with progress.Progress(quiet=False) as shown:
        shown.begin("thinking")
    assert terminal.text() == ""


@pytest.fixture(params=["quiet", "dumb", "pipe"])
def silent(
    request: pytest.FixtureRequest, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    """Whether it was asked for quiet, in the three cases in which nothing is shown."""
    piped = io.StringIO()
    monkeypatch.setattr("sys.stderr", piped if request.param == "pipe" else terminal.stream)
    if request.param == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    yield request.param == "quiet"
    assert (terminal.text(), piped.getvalue()) == ("", "")


def test_quiet_pipes_and_dumb_terminals_are_spared(
    silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", 0.0)
    with progress.Progress(silent) as shown:
        shown.begin("thinking")
        threading.Event().wait(0.05)


@pytest.mark.parametrize(("setting", "coloured"), [(None, True), ("", True), ("1", False)])
def test_errors_are_red_unless_no_color_is_set(
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    setting: str | None,
    coloured: bool,
    tmp_path: Path,
) -> None:
    if setting is not None:
        monkeypatch.setenv("NO_COLOR", setting)
    monkeypatch.setattr("sys.stderr", terminal.stream)
    assert cli.main(["show", str(tmp_path / "none.json")]) == 2
    text = terminal.text()
    assert text.startswith("\x1b[31mmemfit: error:\x1b[0m cannot read ") is coloured
    assert ("\x1b" in text) is coloured


def test_a_file_is_neither_coloured_nor_wide() -> None:
    stream = io.StringIO()
    assert not is_terminal(stream)
    assert red("over", stream) == "over"
    with Path(os.devnull).open() as nowhere:
        assert width(nowhere) == 80
