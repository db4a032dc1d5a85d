"""The benchmarks run, on tiny models, and say what they found with their exit codes.

Each script runs as a person would run it. Times of tiny models mean nothing and are not judged.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]


def run_script(name: str, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def table_rows(output: str) -> list[list[str]]:
    """Cells of the table's lines, without the headers."""
    lines = [line.strip("| ").split("|") for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_the_pictures_of_the_readme_are_drawn(tmp_path: Path) -> None:
    code, output = run_script("pictures.py", "--quick", "--to", str(tmp_path))
    assert code == 0, output
    drawn = sorted(tmp_path.iterdir())
    assert [path.name for path in drawn] == ["curve.svg", "timeline.png"]
    assert ">full<" in drawn[0].read_text() and drawn[1].read_bytes().startswith(b"\x89PNG")
    readme = (ROOT / "README.md").read_text()
    for path in drawn:
        assert f"docs/pictures/{path.name}" in readme
        assert (ROOT / "docs" / "pictures" / path.name).exists()


def test_predictions_are_true() -> None:
    code, output = run_script("truth.py", "--quick", "--models", "t5", "--attention", "sdpa")
    assert code == 0, output
    rows = table_rows(output)
    assert [row[3] for row in rows] == ["1", "least"]
    assert [row[8:10] for row in rows] == [["yes", "yes"]] * 2
    assert rows[0][-1] == "0/4" and rows[1][-1] != "0/4"


def test_predictions_are_true_with_an_optimizer() -> None:
    which = ("--quick", "--models", "gpt2", "--attention", "eager", "--budgets", "0.9")
    options = (*which, "--optimizer", "adamw")
    code, output = run_script("truth.py", *options)
    assert code == 0, output
    assert len(table_rows(output)) == 1


def test_predictions_are_true_under_autocast() -> None:
    which = ("--quick", "--models", "llama", "--attention", "eager", "--budgets", "0.6")
    code, output = run_script("truth.py", *which, "--autocast", "bfloat16")
    assert code == 0, output
    assert len(table_rows(output)) == 1


def test_predictions_are_true_where_gradients_accumulate() -> None:
    which = ("--quick", "--models", "bert", "--attention", "sdpa", "--budgets", "0.6")
    code, output = run_script("truth.py", *which, "--optimizer", "adamw", "--accumulate")
    assert code == 0, output
    assert len(table_rows(output)) == 1


def test_predictions_are_true_without_dropout() -> None:
    which = ("--quick", "--models", "bert", "--attention", "sdpa", "--budgets", "0.9")
    code, output = run_script("truth.py", *which, "--dropout", "0", "0.1")
    assert code == 0, output
    assert [row[2] for row in table_rows(output)] == ["0", "0.1"]


def test_fine_tuning_keeps_to_its_plan() -> None:
    which = ("--quick", "--steps", "5", "--tasks", "lora", "--settings", "1")
    code, output = run_script("finetune.py", *which)
    assert code == 0, output
    assert len(table_rows(output)) == 1


def test_the_frontier_is_measured_at_the_same_peak() -> None:
    rivals = ("hf_2", "keep_attention", "every_second_matmul")
    which = ("--quick", "--models", "bert", "--rivals", *rivals)
    code, output = run_script("frontier.py", *which)
    assert code == 0, output
    rows = table_rows(output)
    assert [tuple(row[:2]) for row in rows] == [("bert", rival) for rival in rivals]
    assert all(float(row[3]) <= float(row[2]) for row in rows)


def test_the_frontier_has_rows_at_budgets_of_their_own() -> None:
    which = ("--quick", "--models", "gpt2", "--rivals", "half", "full_x1.15")
    code, output = run_script("frontier.py", *which)
    assert code == 0, output
    assert [row[1] for row in table_rows(output)] == ["half", "full_x1.15"]
    assert "Budgets broken: 0" in output


def test_the_overhead_of_every_mechanism_is_shown() -> None:
    code, output = run_script("overhead.py", "--quick")
    assert code == 0, output
    names = [row[0] for row in table_rows(output)]
    assert names[0] == "plain" and len(names) == len(set(names)) == 9


def test_the_gpu_script_runs_dry_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--tiny", "--models", "vit", "--to", str(tmp_path))
    some = ("--shares", "0.9", "--goals", "hf_1")
    code, output = run_script("gpu.py", *options, *some)
    assert code == 0, output
    assert "not measured: 1" not in output and "1 not measured" not in output
    code, again = run_script("gpu.py", *options, *some, "--minutes", "0")
    assert (code, again) == (0, output)  # all of it is remembered
    code, output = run_script("gpu.py", *options, "--goals", "hf_2", "--minutes", "0")
    assert code == 1 and "time is up" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    code, output = run_script("gpu.py")
    assert code == 2
    (sentence,) = output.splitlines()
    assert "no CUDA device" in sentence


def test_the_demo_keeps_its_budget(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=256,
        vocab_size=256,
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    batch = ("--batch-size", "8", "--length", "64", "--steps", "2")
    code, output = run_script("demo.py", "--model", str(tmp_path), *batch)
    assert code == 0, output
    rows = table_rows(output)
    assert [row[0] for row in rows] == ["unplanned", "checkpointed", "planned"]
    assert [row[-1] for row in rows] == ["equal"] * 3
    assert "keeps its budget" in output


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")))
def test_recorded_results_say_what_made_them(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["rows"]
    assert {"command", "date", "machine", "versions"} <= record.keys()
    assert {"python", "torch", "transformers", "pulp"} <= record["versions"].keys()


def test_solvers_take_turns_on_the_same_problems() -> None:
    code, output = run_script("solvers.py", "--quick")
    assert code == 0, output
    rows = table_rows(output)
    ours = {"count_ilp", "flat_ilp", "nested_dp", "greedy", "every_2", "full", "sqrt_n"}
    assert {row[2] for row in rows} == ours | {"sac_milp", "knapsack"}
    overheads = {(*row[:3],): row[5] for row in rows}
    for instance, share, solver in overheads:
        if solver in ("count_ilp", "nested_dp") and (instance, share, "flat_ilp") in overheads:
            assert overheads[instance, share, solver] == overheads[instance, share, "flat_ilp"]
    sac = [row for row in rows if row[2] == "sac_milp"]
    assert {row[3] for row in sac} <= {"feasible", "infeasible"}
    assert any(row[5] != "-" and float(row[5]) > 0 for row in sac)


def test_plans_are_near_the_best_schedule() -> None:
    code, output = run_script("optimum.py", "--layers", "2", "--budgets", "0.8", "0.9")
    rows = table_rows(output)
    assert [row[:2] for row in rows] == [["2", "0.8"], ["2", "0.9"]]
    assert all(0 <= float(row[4]) < 2 and row[5] == "optimal" for row in rows)
    assert code == (max(float(row[4]) for row in rows) > 1.5)
