"""Tables for people and JSON for later: what was measured, with which versions, where and when.

Depends on the standard library; versions are read from installed packages.
"""

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def write_results(
    name: str, device: str, rows: Sequence[Mapping[str, Any]], seconds: float
) -> None:
    """Writes the rows and what made them as ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": describe_machine(device),
        "versions": {"python": platform.python_version()} | _versions(),
        "seconds": round(seconds, 1),
        "rows": list(rows),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {path}.")


def describe_machine(device: str) -> str:
    """One line on what measured."""
    cpu = f"{_cpu_name()}, {os.cpu_count()} cores"
    if device != "cuda":
        return cpu
    import torch

    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), {cpu}"


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
