"""Runs measurements in processes of their own, because a CPU's peak is measured once in each.

A script that measures so answers ``script --alone REQUEST`` with the result, both JSON. Depends on
the standard library alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ALONE = "--alone"
_MARK = "RESULT "

Request = Mapping[str, Any]
Measure = Callable[[Request], dict[str, Any]]


class MeasurementFailed(RuntimeError):
    """There is no result: the measured process crashed, or memory ran out."""


def answer(measure: Measure, request: str) -> None:
    """The child's part: measures and prints the result."""
    print(_MARK + json.dumps(measure(json.loads(request))), flush=True)


def alone(
    script: str | Path, request: Request, *, threads: int = 1, options: Sequence[str] = ()
) -> dict[str, Any]:
    """The parent's part: one measurement in a new process."""
    done = subprocess.run(
        [sys.executable, str(script), *options, ALONE, json.dumps(request)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            result: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return result
    raise MeasurementFailed(f"measuring {dict(request)} failed:\n{done.stderr[-3000:]}")


def each(
    measure: Measure, requests: Iterable[Request], jobs: int
) -> Iterator[dict[str, Any] | MeasurementFailed]:
    """Results in the order of the requests, ``jobs`` of them under way at a time."""
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for future in [pool.submit(measure, request) for request in requests]:
            try:
                yield future.result()
            except MeasurementFailed as failure:
                yield failure
