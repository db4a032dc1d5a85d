"""The command line: its outputs, its spellings, its errors of one line and their exit codes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memfit.integrations import cli, progress
from memfit.integrations.commands import show
from memfit.planner.document import Plan
from memfit.planner.report import format_plan

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 128,
}
STEP = ("--batch-size", "2", "--sequence-length", "64", "--device", "cpu")

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def plan_file(config: str) -> Path:
    """A plan that recomputes something."""
    path = Path(config).with_name("plan.json")
    assert cli.main(["plan", config, "--budget", "1GiB", *STEP, "--quiet", "-o", str(path)]) == 0
    budget = Plan.load(path).predicted.unplanned_peak_bytes - 1
    words = ["plan", config, "--budget", str(budget), *STEP, "--quiet", "-o", str(path)]
    assert cli.main(words) == 0
    return path


def error_of(output: Output) -> str:
    """The one line that an error is, and nothing on stdout."""
    captured = output.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("memfit: error: ")
    return lines[0].removeprefix("memfit: error: ")


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memfit.integrations", *words]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, check=False, **options)


# -- plan ----------------------------------------------------------------------------------------


def test_json_goes_to_stdout_and_the_table_to_stderr(config: str, capsys: Output) -> None:
    assert cli.main(["plan", config, "--budget", "1GiB", *STEP]) == 0
    captured = capsys.readouterr()
    plan = Plan.from_json(captured.out)
    assert plan.budget_bytes == 2**30
    assert plan.workload.device == "cpu"
    assert captured.err.endswith(format_plan(plan))


def test_the_json_has_the_documented_keys(plan_file: Path) -> None:
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    assert plan["schema"] == "memfit.plan/1"
    assert {key: list(value) for key, value in plan.items() if isinstance(value, dict)} == {
        "made_with": ["memfit", "torch", "transformers"],
        "model": ["class", "fingerprint", "parameters", "trainable_parameters", "dtype"],
        "workload": [
            "batch",
            "optimizer",
            "device",
            "costs",
            "keep_outputs",
            "autocast",
            "notes",
            "keep_gradients",
            "max_grad_norm",
            "sharding",
            "world_size",
            "wrap",
            "reshard_after_forward",
            "param_dtype",
            "reduce_dtype",
        ],
        "predicted": [
            "peak_bytes",
            "peak_at",
            "resident_bytes",
            "step_seconds",
            "recompute_seconds",
            "overhead",
            "unplanned_peak_bytes",
            "unplanned_step_seconds",
            "alive_at_peak",
        ],
        "solver": ["name", "status", "gap", "seconds"],
        "timeline": ["slots", "phases", "kinds", "moments", "moment", "ops", "op", "at_peak"],
        "sensitivity": ["unavoidable_bytes", "free_budget_bytes", "nearby"],
    }
    assert list(plan) == [
        *("schema", "made_with", "model", "workload", "budget_bytes", "predicted", "solver"),
        *("regions", "baselines", "bounds", "sensitivity", "timeline"),
    ]
    region_keys = ["name", "action", "keep", "stored_bytes", "freed_bytes", "recompute_seconds"]
    region_keys += ["kept_because", "recompute", "recompute_input"]
    assert all(list(region) == region_keys for region in plan["regions"])
    assert any(region["recompute"] for region in plan["regions"])
    assert plan["workload"]["batch"]["input_ids"] == {"shape": [2, 64], "dtype": "int64"}


def test_output_leaves_stdout_empty(config: str, tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "plan.json"
    assert cli.main(["plan", config, "--budget", "1GiB", *STEP, "--output", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(format_plan(Plan.load(path)))
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_quiet_leaves_stderr_empty(config: str, capsys: Output) -> None:
    assert cli.main(["plan", config, "--budget", "1GiB", *STEP, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert Plan.from_json(captured.out).regions


def test_both_spellings_mean_the_same(config: str, capsys: Output) -> None:
    hyphens = [
        *("--budget", "1GiB", "--batch-size", "2", "--sequence-length=64", "--time-limit", "5"),
        *("--keep-outputs", "--device", "cpu", "--optimizer", "sgd_momentum", "--quiet"),
    ]
    flags = [w.replace("-", "_").replace("__", "--") if w[0] == "-" else w for w in hyphens]
    assert "--batch_size" in flags and "--sequence_length=64" in flags
    plans = []
    for words in (hyphens, flags):
        assert cli.main(["plan", config, *words]) == 0
        plans.append(Plan.from_json(capsys.readouterr().out))
    assert plans[0].workload.keep_outputs
    assert plans[0].workload.optimizer == "sgd_momentum"
    assert plans[0] == replace(plans[1], solver=plans[0].solver)


def test_a_directory_and_defaults_are_enough(config: str, capsys: Output) -> None:
    assert cli.main(["plan", str(Path(config).parent), "--budget", "4GiB", "--quiet"]) == 0
    plan = Plan.from_json(capsys.readouterr().out)
    assert plan.workload.batch["input_ids"].shape == (1, 128)
    assert plan.workload.notes


def test_nothing_is_said_of_progress_where_stderr_is_no_terminal(
    config: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", 0.0)
    assert cli.main(["plan", config, "--budget", "1GiB", *STEP]) == 0
    assert capsys.readouterr().err.startswith("model ")


def test_timings_name_each_part_of_the_work(config: str, capsys: Output) -> None:
    assert cli.main(["plan", config, "--budget", "1GiB", *STEP, "--quiet", "--timings"]) == 0
    lines = capsys.readouterr().err.splitlines()
    parts = ("building", "capturing", "pricing", "finding regions", "solving", "simulating", "all")
    assert all(any(f"s of CPU  {part}" in line for line in lines) for part in parts)
    seconds = [float(line.split()[0]) for line in lines]
    assert abs(sum(seconds[:-1]) - seconds[-1]) < 0.1


def test_timings_are_said_when_no_plan_keeps_the_budget(config: str, capsys: Output) -> None:
    assert cli.main(["plan", config, "--budget", "1KiB", *STEP, "--timings"]) == 3
    assert "s of CPU  solving for" in capsys.readouterr().err


# -- show and help -------------------------------------------------------------------------------


def test_show_prints_the_table(plan_file: Path, capsys: Output) -> None:
    assert cli.main(["show", str(plan_file)]) == 0
    captured = capsys.readouterr()
    assert captured.out == format_plan(Plan.load(plan_file))
    assert captured.err == ""


def test_show_prints_the_plan_itself(plan_file: Path, capsys: Output) -> None:
    assert cli.main(["show", str(plan_file), "--json"]) == 0
    assert capsys.readouterr().out == plan_file.read_text(encoding="utf-8")


def test_help_show_and_explain_import_nothing_heavy(plan_file: Path) -> None:
    script = """
import sys
from memfit.integrations.cli import main
names = ("plan", "show", "explain", "check", "solve", "doctor")
helps = [[name, "--help"] for name in names]
for words in (["--help"], *helps, ["show", sys.argv[1]], ["explain", sys.argv[1]]):
    try:
        status = main(words)
    except SystemExit as exit:
        status = exit.code
    assert status == 0
heavy = {"torch", "transformers", "numpy", "networkx", "pulp"} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", script, str(plan_file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "memfit plan bert --budget" in result.stdout
    assert "--batch-size" in result.stdout and "--batch_size" not in result.stdout


def test_without_a_command_the_help_is_shown(capsys: Output) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "examples:" in captured.err


def test_the_module_is_the_command() -> None:
    result = run("--version", stdout=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"memfit \d+\.\d+\.\d+\S*\n", result.stdout)


# -- solve ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem_file(config: str) -> Path:
    path = Path(config).with_name("problem.json")
    words = ["plan", config, "--budget", "1KiB", *STEP, "--quiet", "--save-problem", str(path)]
    assert cli.main(words) == 3, "it is saved all the same"
    return path


def test_a_saved_problem_is_solved_without_the_model(problem_file: Path, capsys: Output) -> None:
    solve = ["solve", str(problem_file), "--budget"]
    assert cli.main([*solve, "1GiB"]) == 0
    kept = json.loads(capsys.readouterr().out)
    assert (kept["status"], kept["recompute_seconds"]) == ("optimal", 0.0)
    assert {region["action"] for region in kept["regions"]} == {"keep"}
    for solver in ("flat_ilp", "greedy", "auto"):
        assert cli.main([*solve, str(kept["peak_bytes"] - 1), "--solver", solver]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        solution = json.loads(captured.out)
        assert solution["peak_bytes"] < kept["peak_bytes"]
        assert solution["recompute_seconds"] > 0


@pytest.mark.parametrize("solver", ["auto", "full"])
def test_the_smallest_budget_of_a_problem_is_named_and_works(
    problem_file: Path, capsys: Output, solver: str
) -> None:
    words = ["solve", str(problem_file), "--solver", solver]
    assert cli.main(words) == 3
    minimum = re.findall(r"--budget (\d+)", error_of(capsys))[-1]
    assert cli.main([*words, "--budget", minimum]) == 0
    assert json.loads(capsys.readouterr().out)["peak_bytes"] <= int(minimum)


def test_solving_imports_neither_torch_nor_transformers(problem_file: Path) -> None:
    code = (
        "import sys\nfrom memfit.integrations import cli\n"
        f"cli.main(['solve', {str(problem_file)!r}, '--budget', '1GiB'])\n"
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
    assert json.loads(done.stdout)["schema"] == "memfit.solution/1", "and nothing else is printed"


def test_the_problem_needs_a_file_of_its_own(config: str, tmp_path: Path, capsys: Output) -> None:
    same = str(tmp_path / "same.json")
    words = ["plan", config, "--budget", "1GiB", "-o", same, "--save-problem", same]
    assert cli.main(words) == 2
    assert "is named twice" in error_of(capsys)


def test_what_is_no_problem_is_refused(problem_file: Path, tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["solve", str(tmp_path / "none.json")]) == 2
    assert "cannot read" in error_of(capsys)
    (tmp_path / "half.json").write_text(problem_file.read_text()[:99], encoding="utf-8")
    assert cli.main(["solve", str(tmp_path / "half.json")]) == 2
    assert "is not a problem" in error_of(capsys)
    assert cli.main(["solve", str(problem_file), "--budget", "9" * 400]) == 2
    assert "the budget is" in error_of(capsys)


# -- what is refused -----------------------------------------------------------------------------


def test_the_smallest_budget_is_named_and_works(config: str, capsys: Output) -> None:
    assert cli.main(["plan", config, "--budget", "1KiB", *STEP]) == 3
    message = error_of(capsys)
    minimum = int(re.findall(r"(\d+) bytes", message)[-1])

    words = ["plan", config, *STEP, "--quiet", "--budget"]
    assert cli.main([*words, str(minimum)]) == 0
    assert Plan.from_json(capsys.readouterr().out).predicted.peak_bytes <= minimum
    assert cli.main([*words, str(int(0.97 * minimum))]) == 3
    assert f"{minimum} bytes" in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--budget", "12 potatoes"], "'12 potatoes' is not a memory budget"),
        (["--budget", "-5GiB"], "'-5GiB' is not a memory budget"),
        (["--budget", "-5"], "'-5' is not a memory budget"),
        (["--budget=-5"], "'-5' is not a memory budget"),
        (["--budget", "0"], "'0' is not a memory budget"),
        (["--budget", "auto", "--device", "cpu"], "'auto'"),
        ([], "required: --budget; see `memfit plan --help`"),
        (["--budget", "1GiB", "--batch-size", "0"], "from 1 up, not 0"),
        (["--budget", "1GiB", "--batch-size", "-1"], "from 1 up, not -1"),
        (["--budget", "1GiB", "--batch-size", "many"], "invalid int value: 'many'"),
        (["--budget", "1GiB", "--sequence-length", "129"], "length of 129"),
        (["--budget", "1GiB", "--device", "abacus"], "'abacus' is not a device"),
        (["--budget", "1GiB", "--dtype", "int3"], "'int3'"),
        (["--budget", "1GiB", "--optimizer", "guess"], "unknown optimizer 'guess'"),
        (["--budget", "1GiB", "--task", "juggling"], "'juggling'"),
        (["--budget", "1GiB", "--solver", "oracle"], "invalid choice: 'oracle'"),
        (["--budget", "1GiB", "--gap", "nan"], "'nan' is not a number from 0"),
        (["--budget", "1GiB", "--gap", "wide"], "'wide' is not a number from 0"),
        (["--budget", "1GiB", "--time-limit", "-1"], "'-1' is not a number of seconds"),
        (["--budget", "1GiB", "--speed", "high"], "unrecognized arguments: --speed high"),
    ],
    ids=" ".join,
)
def test_wrong_usage(config: str, capsys: Output, words: list[str], expected: str) -> None:
    assert cli.main(["plan", config, *words]) == 2
    assert expected in error_of(capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "holds list"),
        ("{}", "no model_type"),
        ('{"model_type": "llamma"}', "llama"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_an_unreadable_config(tmp_path: Path, capsys: Output, content: str, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    assert cli.main(["plan", str(path), "--budget", "1GiB"]) == 2
    message = error_of(capsys)
    assert expected in message and str(path) in message


def test_an_unknown_model(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["plan", "bertt", "--budget", "1GiB"]) == 2
    message = error_of(capsys)
    assert "'bertt'" in message and "bert" in message.replace("bertt", "")


@pytest.mark.parametrize("output", ["missing/plan.json", "."])
def test_an_output_that_cannot_be_is_refused_first(
    tmp_path: Path, capsys: Output, output: str
) -> None:
    path = tmp_path / output
    # No such model either: the output is what is looked at first.
    assert cli.main(["plan", "bertt", "--budget", "1GiB", "-o", str(path)]) == 2
    assert error_of(capsys).startswith(f"cannot write {path}: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text[:-20], "truncated"),
        (lambda text: "", "not a plan"),
        (lambda text: "not JSON", "not a plan"),
        (lambda text: "[1, 2]", "schema None"),
        (lambda text: text.replace("memfit.plan/1", "memfit.plan/9"), "'memfit.plan/9'"),
        (lambda text: text.replace('"budget_bytes"', '"budget"'), "$.budget_bytes is missing"),
        (lambda text: text.replace('"gap": ', '"gap": "none", "was": '), "$.solver.gap"),
        (lambda text: text.replace("LlamaFor", "\udcff"), "cannot read"),
    ],
    ids="truncated empty text list schema key type encoding".split(),
)
def test_an_unreadable_plan(
    plan_file: Path, tmp_path: Path, capsys: Output, change: Any, expected: str
) -> None:
    path = tmp_path / "plan.json"
    text = change(plan_file.read_text(encoding="utf-8"))
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    assert cli.main(["show", str(path)]) == 2
    message = error_of(capsys)
    assert expected in message and str(path) in message


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_plan_that_is_not_there(tmp_path: Path, capsys: Output, name: str) -> None:
    assert cli.main(["show", str(tmp_path / name)]) == 2
    assert error_of(capsys).startswith("cannot read ")


def test_an_unknown_command(capsys: Output) -> None:
    assert cli.main(["plam"]) == 2
    assert "invalid choice: 'plam'" in error_of(capsys)


def test_debug_shows_the_traceback(tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["show", str(tmp_path / "missing.json"), "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("memfit: error: cannot read ")


def test_interruption_is_quiet(
    plan_file: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "write_table", interrupt)
    assert cli.main(["show", str(plan_file)]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet(plan_file: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        result = run("show", str(plan_file), stdout=write)
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (141, "")
