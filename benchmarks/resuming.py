"""Remembers measurements in a file, so that a script that was cut off goes on where it stopped.

One line of JSON for each. What another machine or other versions measured is measured anew; after a
change of memfit itself, remove the file. Depends on the standard library and on the report.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import Measure, MeasurementFailed, Request
from benchmarks.report import provenance


class Remembered:
    """Measures what the file does not have, until the time is up."""

    def __init__(self, path: Path, measure: Measure, device: str, until_seconds: float) -> None:
        """``until_seconds`` is a time of the monotonic clock."""
        self._path = path
        self._measure = measure
        self._until_seconds = until_seconds
        self._by = provenance(device)
        self._known = dict(self._read()) if path.exists() else {}

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut off, or empty
                continue
            if record["by"] == self._by:
                yield _key(record["request"]), record["result"]

    def __call__(self, request: Request) -> dict[str, Any]:
        """The result, which is written before it is returned."""
        key = _key(request)
        if key not in self._known:
            if time.monotonic() > self._until_seconds:
                raise MeasurementFailed("time is up; the same command goes on from here")
            result = self._measure(request)
            record = {"request": dict(request), "result": result, "by": self._by}
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(record))  # after what may have been cut off
            self._known[key] = result
        return self._known[key]


def _key(request: Request) -> str:
    return json.dumps(dict(request), sort_keys=True)
