"""The timeline of a plan: its sums are the simulator's, it survives a file, and it is compact."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfit.integrations import cli
from memfit.planner import InfeasibleBudget, Plan, plan, timeline
from memfit.planner.alive import make_timeline
from memfit.planner.errors import PlanError
from memfit.planner.peak_report import format_peak
from memfit.planner.preparing import prepare
from memfit.planner.report import WIDTH
from memfit.planner.timeline import AliveTensor, MemoryTimeline, decode_column, encode_column
from memfit.planner.writing import write_plan
from tests.chains import UNIT, Chain

GOLDEN = Path(__file__).parent / "golden"
Output = pytest.CaptureFixture[str]


def at_peak(recorded: MemoryTimeline) -> tuple[int, dict[str, int]]:
    """The slot of the peak, and the bytes there by kind."""
    by_kind = recorded.bytes_by_kind()
    totals = [sum(column) for column in zip(*by_kind.values(), strict=True)]
    slot = totals.index(max(totals))
    return slot, {kind: row[slot] for kind, row in by_kind.items()}


# -- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "device", "optimizer"),
    [
        ("gpt2", "cpu", None),
        ("gpt2", "h100", "adamw"),
        ("bert", "cpu", "adamw"),
        ("bert", "h100", None),
        ("llama", "cpu", "adamw"),
        ("llama", "h100", None),
    ],
)
def test_the_kinds_add_up_to_what_the_simulator_says(
    make: Callable[..., Any], name: str, device: str, optimizer: str | None
) -> None:
    model, batch = make(name, layers=3)
    prepared = prepare(model, batch, optimizer=optimizer, device=device)
    with pytest.raises(InfeasibleBudget) as error:
        prepared.task.within(1).solve("auto")
    recomputes = []
    for budget, solver in (
        (1 << 40, "auto"),
        (error.value.minimum_bytes, "auto"),
        (1 << 40, "full"),
    ):
        outcome = prepared.task.within(budget).solve(solver)
        written = write_plan(prepared, outcome)
        recorded = written.recorded_timeline()
        by_kind = recorded.bytes_by_kind()
        totals = [sum(column) for column in zip(*by_kind.values(), strict=True)]
        assert totals == outcome.timeline.alive_bytes.tolist()
        assert max(totals) == written.predicted.peak_bytes
        slot, alive = at_peak(recorded)
        assert recorded.moment_of_slots()[slot] == written.predicted.peak_at
        named: Counter[str] = Counter()
        for tensor in recorded.at_peak:
            named[tensor.kind] += tensor.total_bytes
        assert named == {kind: size for kind, size in alive.items() if size}
        assert (
            list(recorded.phases)
            == ["forward", "backward", "optimizer step"][: 2 + (optimizer is not None)]
        )
        recomputes.append(max(by_kind.get(timeline.RECOMPUTED, [0])))
    assert recomputes[0] == 0 < recomputes[2]


def test_kinds_of_a_chain_by_hand() -> None:
    prepared = prepare(Chain(), (torch.zeros(UNIT // 4),), device="cpu")
    kept = make_timeline(prepared.task.within(1 << 40).solve("none"))
    slot, alive = at_peak(kept)
    # 7 outputs of tanh are saved beside the one that the sum reads; the backward of that one has
    # made a gradient. The loss, and the gradient of the sum, are 4 bytes each.
    assert {kind: size for kind, size in alive.items() if size} == {
        timeline.PARAMETERS: UNIT,
        timeline.BATCH: UNIT,
        timeline.KEPT: 7 * UNIT,
        timeline.LOSS: UNIT + 8,
        timeline.TEMPORARIES: UNIT,
    }
    assert kept.moment_of_slots()[slot] == "backward of blocks.3"
    assert kept.op_of_slots()[slot] == "tanh_backward"
    assert AliveTensor("blocks.0-3", "tanh", timeline.KEPT, (UNIT // 4,), "float32", 7, UNIT) in (
        kept.at_peak
    )
    assert [t.path for t in kept.at_peak if t.kind == timeline.PARAMETERS] == ["weight"]
    assert [t.path for t in kept.at_peak if t.kind == timeline.BATCH] == ["0"]
    # Once the step is over, the gradient is left, and the loss.
    last = {kind: row[-1] for kind, row in kept.bytes_by_kind().items()}
    assert last[timeline.GRADIENTS] == UNIT

    checkpointed = make_timeline(prepared.task.within(1 << 40).solve("full"))
    slot, alive = at_peak(checkpointed)
    # Kept are the inputs of the blocks; the last one has made its two outputs again.
    assert alive[timeline.KEPT] == 4 * UNIT
    assert alive[timeline.RECOMPUTED] == 2 * UNIT
    assert alive[timeline.TEMPORARIES] == UNIT
    moments = checkpointed.moment_of_slots()
    assert moments[checkpointed.phases["backward"] :].count("recomputation of blocks.3") == 2


def test_tensors_are_named_after_their_modules(make: Callable[..., Any]) -> None:
    model, batch = make("llama", layers=3)
    written = plan(model, 1 << 40, batch, optimizer="adamw", device="h100", keep_gradients=True)
    found = {(t.path, t.kind): t for t in written.recorded_timeline().at_peak}
    name = "model.layers.0-2.mlp.gate_proj.weight"
    for path, kind in (
        (name, timeline.PARAMETERS),
        (name, timeline.GRADIENTS),
        (f"{name}.exp_avg", timeline.OPTIMIZER),
        (f"{name}.exp_avg_sq", timeline.OPTIMIZER),
    ):
        tensor = found[path, kind]
        assert (tensor.count, tensor.shape, tensor.dtype) == (3, (64, 32), "float32")
        assert tensor.size_bytes == 64 * 32 * 4
        assert tensor.module == "model.layers.0-2.mlp.gate_proj"
    assert found["input_ids", timeline.BATCH].shape == (2, 16)


def test_the_logits_are_told_apart(make: Callable[..., Any]) -> None:
    model, batch = make("gpt2", layers=2)
    recorded = plan(model, 1 << 40, batch, device="cpu").recorded_timeline()
    logits = 2 * 16 * 100 * 4
    loss = recorded.bytes_by_kind()[timeline.LOSS]
    moments = recorded.moment_of_slots()
    assert max(loss) >= 3 * logits
    # Only what the loss saved is there when its backward begins.
    assert logits <= loss[recorded.phases["backward"]] < 2 * logits
    assert not any(loss[: moments.index("forward of lm_head")])
    assert loss[-1] < logits


# -- files ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**62), max_size=50))
def test_a_column_survives(values: list[int]) -> None:
    assert decode_column(encode_column(values), len(values)) == values


def test_a_column_that_was_written_elsewhere() -> None:
    # What compresses them may differ, so that a text is only read here.
    assert decode_column("eJxjZEAFAAAgAAI=", 2) == [1, 1]


@pytest.mark.parametrize("text", ["", "*", "AAAA", encode_column([1, 2]), encode_column([1] * 9)])
def test_a_damaged_column_is_named(text: str) -> None:
    recorded = replace(SMALL, kinds={timeline.BATCH: text})
    with pytest.raises(PlanError, match=r"cannot be read: \$\.timeline\.kinds\.batch: "):
        recorded.bytes_by_kind()
    with pytest.raises(PlanError, match=r"\$\.timeline\.moment: "):
        replace(SMALL, moment=text).moment_of_slots()


def test_an_index_without_a_word_is_refused() -> None:
    with pytest.raises(PlanError, match=r"\$\.timeline\.op: it points beyond 2 entries"):
        replace(SMALL, op=encode_column([0, 1, 2])).op_of_slots()


def test_a_plan_with_a_timeline_survives_a_file(made: Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


def test_depth_costs_hardly_anything(make: Callable[..., Any]) -> None:
    sizes, slots = [], []
    for layers in (10, 40):
        model, batch = make("llama", layers=layers)
        value = json.loads(plan(model, 1 << 40, batch, optimizer="adamw", device="cpu").to_json())
        sizes.append(len(json.dumps(value["timeline"])))
        slots.append(value["timeline"]["slots"])
    assert slots[1] > 3 * slots[0]
    assert sizes[1] < min(2 * sizes[0], 60_000)


# -- the table of the peak -----------------------------------------------------------------------

SMALL = MemoryTimeline(
    slots=3,
    phases={"forward": 0, "backward": 2},
    kinds={
        timeline.PARAMETERS: encode_column([3 << 30] * 3),
        timeline.KEPT: encode_column([0, 4 << 30, 4 << 30]),
        timeline.WORKSPACE: encode_column([0, 0, 1 << 20]),
    },
    moments=("forward of layers.0", "backward of layers.3"),
    moment=encode_column([0, 0, 1]),
    ops=("mm", "mm_backward"),
    op=encode_column([0, 0, 1]),
    at_peak=(
        AliveTensor(
            "layers.0-3.mlp", "mm", timeline.KEPT, (8, 2048, 32768), "bfloat16", 4, 1 << 30
        ),
        AliveTensor(
            "layers.0-3.mlp", "weight", timeline.PARAMETERS, (4096, 4096), "float32", 3, 1 << 30
        ),
        AliveTensor("", "mm_backward", timeline.WORKSPACE, (), "", 1, 1 << 20),
    ),
)


@pytest.fixture(scope="module")
def made() -> Plan:
    """A plan that recomputes something."""
    x = torch.zeros(UNIT // 4)
    unplanned = plan(Chain(), 1 << 40, (x,), device="cpu").predicted.unplanned_peak_bytes
    return plan(Chain(), unplanned - UNIT, (x,), device="cpu")


def test_the_table_of_the_peak_reads_like_this(made: Plan) -> None:
    predicted = replace(
        made.predicted, peak_bytes=(7 << 30) + (1 << 20), peak_at="backward of layers.3"
    )
    small = replace(made, predicted=predicted, timeline=SMALL)
    expected = (GOLDEN / "peak.txt").read_text(encoding="utf-8")
    assert format_peak(small, 2) == expected
    assert max(map(len, expected.splitlines())) <= WIDTH
    assert "others" not in format_peak(small, 3)


def test_show_prints_the_largest_tensors(made: Plan, tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "plan.json"
    made.save(path)
    assert cli.main(["show", str(path), "--top", "2"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (format_peak(made, 2), "")


@pytest.mark.parametrize("words", [["--top", "3"], ["--timeline", "picture.html"]])
def test_a_plan_without_a_timeline_says_how_to_get_one(
    made: Plan, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    value = json.loads(made.to_json())
    del value["timeline"]
    Path("plan.json").write_text(json.dumps(value), encoding="utf-8")
    assert Plan.load("plan.json") == replace(made, timeline=None)
    assert cli.main(["show", "plan.json"]) == 0
    capsys.readouterr()
    assert cli.main(["show", "plan.json", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "does not say what is alive when; make it again with `memfit plan`" in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_what_is_no_count_is_refused(capsys: Output, count: str) -> None:
    assert cli.main(["show", "plan.json", "--top", count]) == 2
    assert f"'{count}' is not a number from 1 up" in capsys.readouterr().err


def test_reading_a_timeline_imports_nothing_heavy(made: Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "plan.json")
    script = (
        "import sys\nfrom memfit.integrations import cli\n"
        "assert cli.main(['show', 'plan.json', '--top', '3', '--timeline', 'a.html']) == 0\n"
        "print({'torch', 'numpy', 'matplotlib', 'networkx', 'pulp'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.endswith("set()\n")
