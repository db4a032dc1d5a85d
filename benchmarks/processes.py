"""Runs measurements in processes of their own, because a CPU's peak is measured once in each.

A script that measures so answers ``script --alone REQUEST`` with the result, both JSON; where there
are many, short ones, they run in forks of the script instead, which has imported everything
already. Depends on the standard library alone.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
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


def alone(script: str | Path, request: Request, *, threads: int = 1) -> dict[str, Any]:
    """The parent's part: one measurement in a new process."""
    done = subprocess.run(
        [sys.executable, str(script), ALONE, json.dumps(request)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            result: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return result
    raise MeasurementFailed(f"measuring {dict(request)} failed:\n{done.stderr[-3000:]}")


def attempt(measure: Measure, request: Request) -> dict[str, Any] | MeasurementFailed:
    """The result, or why there is none."""
    try:
        return measure(request)
    except MeasurementFailed as failure:
        return failure


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


@dataclass(frozen=True, slots=True)
class _Fork:
    request: Request
    process: Any
    deadline: float


def forks(
    measure: Measure, requests: Iterable[Request], jobs: int, seconds: float
) -> Iterator[tuple[Request, dict[str, Any] | MeasurementFailed]]:
    """Requests and results as they come; one that takes longer than ``seconds`` has failed.

    This process must not have started threads: a fork has none of them.
    """
    context = multiprocessing.get_context("fork")
    pending, running = list(reversed(list(requests))), dict[Connection, _Fork]()
    while pending or running:
        while pending and len(running) < jobs:
            request = pending.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_answer_into, args=(theirs, measure, request))
            process.start()
            theirs.close()
            running[mine] = _Fork(request, process, time.monotonic() + seconds)
        ready = wait(list(running), timeout=1.0)
        late = [c for c, fork in running.items() if time.monotonic() > fork.deadline]
        for connection in [c for c in running if c in ready or c in late]:
            fork = running.pop(connection)
            yield fork.request, _result_of(connection, fork, seconds)


def fork(measure: Measure, request: Request, seconds: float = 600.0) -> dict[str, Any]:
    """One measurement in a fork of this process."""
    ((_, result),) = forks(measure, [request], 1, seconds)
    if isinstance(result, MeasurementFailed):
        raise result
    return result


def _answer_into(connection: Connection, measure: Measure, request: Request) -> None:
    try:
        answer: object = measure(request)
    except Exception:
        answer = traceback.format_exc()
    connection.send(answer)


def _result_of(
    connection: Connection, fork: _Fork, seconds: float
) -> dict[str, Any] | MeasurementFailed:
    try:
        result = connection.recv() if connection.poll() else f"it took more than {seconds:.0f} s"
    except EOFError:
        result = "its process died"
    fork.process.kill()
    fork.process.join()
    connection.close()
    return result if isinstance(result, dict) else MeasurementFailed(result)
