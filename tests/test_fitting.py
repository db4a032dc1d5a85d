"""``memfit fit``: its answer trains within the budget, and one more example does not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.integrations import cli
from memfit.integrations.models import build_model
from memfit.planner import Batch, InfeasibleBudget
from memfit.planner.fitting import FULL, PLANNED, UNPLANNED, WAYS, find_fits, largest
from memfit.planner.preparing import prepare

ROOT = Path(__file__).parents[1]
LENGTH = 32
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 64},
    "bert": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128,
        "intermediate_size": 128, "max_position_embeddings": 64,
    },
    "llama": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128,
        "intermediate_size": 128, "max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(name: str) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"model_type": name} | SMALL[name]))
        return str(path)

    return write


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=60),
    st.integers(0, 400),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_the_search_finds_the_largest(rises: list[int], budget: int, most: int | None) -> None:
    asked: list[int] = []

    def needs(size: int) -> int:
        asked.append(size)
        return sum(rises[:size]) + (0 if size <= len(rises) else 1000)

    sizes = range(1, (most or len(rises)) + 1)
    expected = max((size for size in sizes if needs(size) <= budget), default=0)
    asked.clear()
    assert largest(needs, budget, most) == expected
    assert len(asked) == len(set(asked)) <= 40


def test_a_line_is_found_at_once() -> None:
    asked: list[int] = []

    def needs(size: int) -> int:
        asked.append(size)
        return 1000 + 7 * size

    assert largest(needs, 1000 + 7 * 123) == 123
    assert len(asked) <= 8


def measured(config: str, size: int, budget: int) -> int:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fit_step.py"), config, str(size), str(budget)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.parametrize("name", SMALL)
def test_the_answer_trains_and_its_successor_does_not(
    name: str, config: Callable[[str], str]
) -> None:
    path = config(name)
    model = build_model(path)
    budget = 3 * 2**19

    def prepared(size: int) -> Any:
        return prepare(model, Batch(size, LENGTH), device="cpu", costs="roofline")

    fits = {fit.way: fit for fit in find_fits(prepared, budget)}
    assert tuple(fits) == WAYS
    assert 1 <= fits[UNPLANNED].size < fits[PLANNED].size >= fits[FULL].size
    size = fits[PLANNED].size
    assert measured(path, size, budget) <= budget
    assert measured(path, size + 1, budget) > budget
    for fit in fits.values():
        assert fit.peak_bytes <= budget and not fit.is_limit


def test_only_what_fits_is_timed(config: Callable[[str], str]) -> None:
    model = build_model(config("gpt2"))
    tried, timed = [], []

    def trying(size: int) -> Any:
        tried.append(size)
        return prepare(model, Batch(size, LENGTH), device="cpu", costs="roofline")

    def timing(size: int) -> Any:
        timed.append(size)
        return trying(size)

    fits = find_fits(trying, 3 * 2**19, None, timing)
    assert timed == list(dict.fromkeys(fit.size for fit in fits))
    assert max(tried) > max(timed)


def test_nothing_fits(config: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", config("gpt2"), "--budget", "1MiB", "--device", "cpu", "--costs", "roofline"]
    assert cli.main(words) == 3
    least = int(capsys.readouterr().err.split("it needs ")[1].split("(")[1].split()[0])
    model = build_model(config("gpt2"))
    with pytest.raises(InfeasibleBudget) as error:
        find_fits(lambda size: prepare(model, Batch(size), device="cpu"), least - 1)
    assert error.value.minimum_bytes == least


def test_the_command_prints_a_table(
    config: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", config("bert"), "--budget", "1.5MiB", "--sequence-length", "32"]
    assert cli.main([*words, "--device", "cpu", "--costs", "roofline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the largest batch within 1.50 MiB"
    assert [line.split("  ")[0] for line in lines[3:]] == list(WAYS)
    assert all(len(line) <= 80 for line in lines)


def test_lengths_end_at_the_positions_of_the_model(
    config: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", config("llama"), "--batch-size", "2", "--device", "h100"]
    assert cli.main([*words, "--budget", "1GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "memfit.fit/1"
    for way in found["ways"]:
        assert way["sequence_length"] == 64 and way["is_limit"] and way["batch_size"] == 2
        assert way["tokens_per_second"] == pytest.approx(64 * way["samples_per_second"])
    assert cli.main([*words, "--budget", "1GiB"]) == 0
    assert "the model takes no longer ones" in capsys.readouterr().out


def test_a_wrong_budget_is_told_before_anything_is_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["fit", "no-such-model", "--budget", "much"]) == 2
    assert "'much' is not a memory budget" in capsys.readouterr().err
