"""``memfit doctor``: what is found, what is missing, and that it comes to an end without torch."""

import json
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest

from memfit.integrations import cli, environment
from memfit.integrations.commands import doctor
from memfit.integrations.environment import Environment, FoundSolver, Package, find_environment

Output = pytest.CaptureFixture[str]

WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from memfit.integrations import cli
sys.exit(cli.main(["doctor", "--json"]))
"""


def test_here_plans_can_be_made(capsys: Output) -> None:
    assert cli.main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.endswith("\nplans can be made here\n")
    assert max(map(len, captured.out.splitlines())) <= 80
    for name in ("memfit", "torch", "transformers", "pulp", "highspy", "networkx", "numpy"):
        assert f"\n{name:14}{version(name)}\n" in captured.out
    assert "\ndevice        cpu, " in captured.out
    assert "\nsolver        HiGHS solves\n" in captured.out


@pytest.mark.parametrize("names", [("torch",), ("transformers",), ("pulp", "highspy")])
def test_what_cannot_be_imported_is_named_with_the_way_out(names: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", WITHOUT.format(names=names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    found = json.loads(done.stdout)
    assert (found["schema"], found["ready"]) == ("memfit.doctor/1", False)
    for name in names:
        problem = next(p for p in found["problems"] if p.startswith(f"{name} cannot be imported"))
        assert f"pip install --force-reinstall '{name}>=" in problem
    assert bool(found["solvers"]) is ("pulp" not in names)


def test_what_is_not_installed_or_old_is_named() -> None:
    missing = environment._needed("no-such-package>=1.2")
    assert (missing.version, missing.problem) == (None, "is not installed")
    assert missing.remedy == "pip install 'no-such-package>=1.2'"
    old = environment._needed("numpy>=99.1")
    assert (old.problem, old.remedy) == ("is older than 99.1", "pip install 'numpy>=99.1'")
    assert environment._needed(f"numpy>={version('numpy')}").problem == ""


def test_what_is_optional_keeps_nothing_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_OPTIONAL", {"no-such-package": "pip install it"})
    found = find_environment()
    assert found.problems == []
    said = doctor._format(found, found.problems)
    assert "\nno-such-package  is not installed (optional: pip install it)\n" in said


def test_without_a_solver_that_solves_nothing_can_be_planned() -> None:
    here = Environment("3", "x", (Package("memfit", "1", True),), (), ())
    assert here.problems == ["no integer program can be solved: pip install highspy"]
    broken = Environment("3", "x", (), (), (FoundSolver("HiGHS", "it crashed"),))
    assert broken.problems == here.problems
    assert "solver  HiGHS it crashed" in doctor._format(broken, broken.problems)


def test_gpus_are_looked_up_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NVIDIA H200", "Abacus 9000", "Broken")

    def memory(index: int) -> tuple[int, int]:
        if index == 2:
            raise RuntimeError("driver too old\nmore of it")
        return 2**30, 2**32

    cuda: Any = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: len(names),
        get_device_name=lambda index: names[index],
        mem_get_info=memory,
    )
    monkeypatch.setattr(environment, "import_module", lambda _: SimpleNamespace(cuda=cuda))
    known, unknown, broken = environment._gpus()
    assert (known.known_as, known.free_bytes) == ("h200", 2**30)
    assert doctor._device(known) == "NVIDIA H200, 1.00 GiB of 4.00 GiB free, h200 in memfit's table"
    assert unknown.known_as is None and "no figures for the GPU 'Abacus 9000'" in unknown.problem
    assert broken.problem == "driver too old"
