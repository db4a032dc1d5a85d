"""What the README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from memfit.integrations.cli import main
from memfit.planner import Plan

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_keeps_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, in_a_script, sharded = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "MemfitCallback" in in_a_script and "fully_shard" in sharded, (
        "test_examples.py runs them"
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    plan = Plan.load("plan.json")
    assert plan == names["p"]
    assert "selective" in {region.action for region in plan.regions}
    assert plan.predicted.peak_bytes <= plan.budget_bytes


def test_the_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    memfit (.+)$", README, re.MULTILINE)
    assert len(commands) == 10
    for command in commands:
        words, _, target = command.partition(" > ")
        assert main(shlex.split(words, comments=True)) == 0, capsys.readouterr().err
        if target:
            Path(target).write_text(capsys.readouterr().out)
