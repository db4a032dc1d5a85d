"""What memfit finds on a machine: its packages, devices and solvers, and what is missing.

Everything is tried rather than believed: packages are imported, solvers solve. Depends on the
device table and the solvers; torch and transformers are imported if they can be.
"""

import platform
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from memfit.planner.devices import DeviceError, device_reported_as
from memfit.planner.errors import first_line
from memfit.solvers import try_backends

# What memfit works with where it is there, and how it is had.
_OPTIONAL = {
    "peft": "pip install peft",
    "accelerate": "pip install accelerate",
    "trl": "pip install trl",
    "matplotlib": "pip install 'memfit[plot]'",
}
_MEMORY = Path("/proc/meminfo")
_A_SOLVER = "pip install highspy"


@dataclass(frozen=True, slots=True)
class Package:
    """A package that memfit uses."""

    name: str
    version: str | None
    """Null where it is not installed."""
    needed: bool
    problem: str = ""
    """Why it cannot be used; empty when it can."""
    remedy: str = ""
    """The command that helps."""


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """A device of this machine."""

    name: str
    free_bytes: int | None
    total_bytes: int | None
    known_as: str | None
    """Its name in memfit's table; null where that has no figures for it."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FoundSolver:
    """A solver of integer programs."""

    name: str
    problem: str
    """Why it does not solve; empty when it does."""


@dataclass(frozen=True, slots=True)
class Environment:
    """All of it."""

    python: str
    platform: str
    packages: tuple[Package, ...]
    devices: tuple[FoundDevice, ...]
    solvers: tuple[FoundSolver, ...]

    @property
    def problems(self) -> list[str]:
        """What keeps ``memfit plan`` from running here, each with the command that helps."""
        problems = [
            f"{p.name} {p.problem}: {p.remedy}" for p in self.packages if p.needed and p.problem
        ]
        if not any(not solver.problem for solver in self.solvers):
            problems.append(f"no integer program can be solved: {_A_SOLVER}")
        return problems


def find_environment() -> Environment:
    """Looks at this machine."""
    packages = (
        Package("memfit", version("memfit"), True),
        *(_needed(r) for r in requires("memfit") or () if "extra ==" not in r),
        *(_optional(name, remedy) for name, remedy in _OPTIONAL.items()),
    )
    usable = {p.name for p in packages if not p.problem}
    return Environment(
        platform.python_version(),
        platform.platform(),
        packages,
        (_cpu(), *(_gpus() if "torch" in usable else ())),
        tuple(FoundSolver(*found) for found in (try_backends() if "pulp" in usable else ())),
    )


# -- packages ------------------------------------------------------------------------------------


def _needed(requirement: str) -> Package:
    """A package out of memfit's own requirements, such as ``torch>=2.11``."""
    name = re.split(r"[^\w.-]", requirement)[0]
    installed = _version(name)
    remedy = f"pip install '{requirement}'"
    if installed is None:
        return Package(name, None, True, "is not installed", remedy)
    least = re.search(r">=\s*([\d.]+)", requirement)
    if least is not None and _numbers(installed) < _numbers(least[1]):
        return Package(name, installed, True, f"is older than {least[1]}", remedy)
    try:
        import_module(name)
    except Exception as error:  # a broken installation fails in any way
        problem = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
        again = f"pip install --force-reinstall '{requirement}'"
        return Package(name, installed, True, problem, again)
    return Package(name, installed, True)


def _optional(name: str, remedy: str) -> Package:
    installed = _version(name)
    if installed is None:
        return Package(name, None, False, "is not installed", remedy)
    return Package(name, installed, False)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """Of a version, as far as requirements go: ``2.13.0+cpu`` is (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


# -- devices -------------------------------------------------------------------------------------


def _cpu() -> FoundDevice:
    """The machine's own memory, where Linux says how much of it programs can have."""
    said = _MEMORY.read_text(encoding="ascii") if _MEMORY.is_file() else ""
    kib = {name: int(count) for name, count in re.findall(r"(\w+): +(\d+) kB", said)}
    free, total = (
        kib[name] * 1024 if name in kib else None for name in ("MemAvailable", "MemTotal")
    )
    return FoundDevice("cpu", free, total, "cpu")


def _gpus() -> list[FoundDevice]:
    cuda: Any = import_module("torch").cuda
    if not cuda.is_available():
        return []
    return [_gpu(cuda, index) for index in range(cuda.device_count())]


def _gpu(cuda: Any, index: int) -> FoundDevice:
    name = cuda.get_device_name(index)
    try:
        free, total = cuda.mem_get_info(index)
    except RuntimeError as error:  # taken by another process, or a driver that does not fit
        return FoundDevice(name, None, None, None, first_line(error))
    try:
        return FoundDevice(name, free, total, device_reported_as(name, total).name)
    except DeviceError as error:
        return FoundDevice(name, free, total, None, str(error))
