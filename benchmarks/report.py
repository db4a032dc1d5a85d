"""Tables for people and JSON for later: what was measured, with which versions, where and when.

Depends on the running of measurements; versions are read from installed packages.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.processes import MeasurementFailed

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
_PACKAGES = ("torch", "transformers", "pulp", "highspy")


def mib(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / MIB:.1f}"


def percent(share: float, digits: int = 1, sign: bool = True) -> str:
    """A share as per cent."""
    return f"{100 * share:{'+' if sign else ''}.{digits}f}"


class Table:
    """Prints rows as they come, under headers that say how wide a column is."""

    def __init__(self, headers: Sequence[str]) -> None:
        self._widths = [max(7, len(h)) for h in headers]
        self.row(headers)
        self.row(["-" * width for width in self._widths])

    def row(self, cells: Iterable[object]) -> None:
        texts = [str(c).rjust(w) for c, w in zip(cells, self._widths, strict=True)]
        print("| " + " | ".join(texts) + " |", flush=True)


class _HasCells(Protocol):
    def cells(self) -> list[str]: ...


R = TypeVar("R", bound=_HasCells)


def print_rows(headers: Sequence[str], rows: Iterable[R | Exception]) -> tuple[list[R], int]:
    """Prints rows as they come, and in their place why there is none.

    Returns the rows, and how many measurements failed.
    """
    table = Table(headers)
    measured, failed = [], 0
    for row in rows:
        if isinstance(row, Exception):
            print(row)
            failed += isinstance(row, MeasurementFailed)
            continue
        table.row(row.cells())
        measured.append(row)
    return measured, failed


def write_results(
    name: str,
    device: str,
    rows: Sequence[Mapping[str, Any]],
    seconds: float,
    folder: Path = RESULTS,
) -> None:
    """Writes the rows and what made them as ``NAME.json`` in the folder."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    record = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        **provenance(device),
        "seconds": round(seconds, 1),
        "rows": list(rows),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {path}.")


def provenance(device: str) -> dict[str, Any]:
    """What measures: the machine, versions, and how CUDA's allocator is set, if it is."""
    found = {
        "machine": describe_machine(device),
        "versions": {"python": platform.python_version()} | _versions(),
    }
    settings = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    return found | ({"allocator": settings} if device == "cuda" and settings else {})


def describe_machine(device: str) -> str:
    """One line on what measured."""
    cpu = f"{_cpu_name()}, {os.cpu_count()} cores"
    if device != "cuda":
        return cpu
    import torch

    driver = _driver_version()
    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}, driver {driver}), {cpu}"


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
