"""What the pages of ``docs/`` show works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from memfit.integrations.cli import main

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    for command in re.findall(r"^    memfit (.+)$", text, re.MULTILINE):
        assert main(shlex.split(command)) == 0, capsys.readouterr().err


def test_pages_are_linked() -> None:
    readme = (PAGES[0].parents[1] / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{page.name}" in readme for page in PAGES)


def test_results_that_are_cited_are_there() -> None:
    root = PAGES[0].parents[1]
    text = "".join(path.read_text(encoding="utf-8") for path in (root / "README.md", *PAGES))
    cited = set(re.findall(r"benchmarks/results/[\w-]+\.json", text))
    assert len(cited) > 5
    assert [name for name in sorted(cited) if not (root / name).exists()] == []
