"""The table of a plan says what the record holds, in 80 columns, for ordinary and odd plans."""

from dataclasses import replace
from pathlib import Path

import pytest

from memfit.planner import document
from memfit.planner.report import WIDTH, format_plan, format_seconds

GOLDEN = Path(__file__).parent / "golden"
MIB = 2**20
GIB = 2**30


def region(
    name: str,
    action: str = "keep",
    stored_mib: int = 96,
    freed_mib: int = 0,
    seconds: float = 0.0,
    reason: str = "",
) -> document.RegionPlan:
    return document.RegionPlan(name, action, (), stored_mib * MIB, freed_mib * MIB, seconds, reason)


def checkpoint(name: str) -> document.RegionPlan:
    return region(name, "checkpoint", stored_mib=16, freed_mib=80, seconds=0.0125)


def make_plan(*regions: document.RegionPlan) -> document.Plan:
    """A plan as one of a decoder with 12 layers on a large GPU."""
    return document.Plan(
        made_with=document.MadeWith("0.1.0", "2.13.0", None),
        model=document.Model("DecoderForCausalLM", "sha256:0", 1_234_567_890, 1_234_567_890),
        workload=document.Workload(
            batch={
                "input_ids": document.TensorSpec((8, 2048), "int64"),
                "labels": document.TensorSpec((8, 2048), "int64"),
            },
            optimizer="adamw",
            device="h100",
            costs="roofline of h100",
            keep_outputs=False,
            notes=("batch of 8 x 2048 tokens made from DecoderConfig; labels = input_ids",),
        ),
        budget_bytes=24 * GIB,
        predicted=document.Predicted(
            peak_bytes=23 * GIB,
            peak_at="backward of model.layers.11",
            resident_bytes=14 * GIB,
            step_seconds=1.5,
            recompute_seconds=0.1,
            overhead=0.1 / 1.4,
            unplanned_peak_bytes=31 * GIB,
            unplanned_step_seconds=1.4,
            alive_at_peak={
                "optimizer state": 9 * GIB,
                "activation": 9 * GIB,
                "parameter": 5 * GIB - 64 * 1024,
                "generator states and samples": 32 * 1024,
                "batch": 32 * 1024,
            },
        ),
        solver=document.SolverReport("ilp", "optimal", 0.0, 0.0312),
        regions=regions,
        baselines=(
            document.Baseline("none", 31 * GIB, 0.0),
            document.Baseline("full", 19 * GIB, 0.27),
            document.Baseline("every_2", 25 * GIB, 0.135),
        ),
    )


def shown_regions(plan: document.Plan) -> list[str]:
    """The lines of the block that lists the regions, without its head."""
    block = next(b for b in format_plan(plan).split("\n\n") if b.startswith("region"))
    return block.splitlines()[1:]


def test_a_plan_reads_like_this() -> None:
    layers = [f"model.layers.{i}" for i in range(12)]
    plan = make_plan(
        region("model.embed_tokens", stored_mib=0, reason="called elsewhere in the step, too"),
        *map(checkpoint, layers[:8]),
        *map(region, layers[8:11]),
        replace(
            region(layers[11], "selective", stored_mib=64, freed_mib=32, seconds=4.2e-5),
            keep=("self_attn.sdpa", "self_attn.sdpa[1]", "mlp.gate_proj.mm", "mlp.up_proj.mm"),
            recompute=("input_layernorm.mul#2", "mlp.act_fn.silu", "mlp.mul"),
        ),
        region("lm_head", stored_mib=512),
    )
    expected = (GOLDEN / "plan.txt").read_text(encoding="utf-8")
    assert format_plan(plan) == expected
    assert max(map(len, expected.splitlines())) <= WIDTH


def test_numbered_regions_that_are_treated_alike_share_a_line() -> None:
    plan = make_plan(
        checkpoint("h.0"), checkpoint("h.1"), region("h.2"), checkpoint("h.3"), checkpoint("h.5")
    )
    assert [line.split()[:2] for line in shown_regions(plan)] == [
        ["h.0-1", "checkpoint"],
        ["h.2", "keep"],
        ["h.3", "checkpoint"],
        ["h.5", "checkpoint"],
    ]
    assert shown_regions(plan)[0].split() == "h.0-1 checkpoint 32.0 MiB 160 MiB 25.0 ms".split()


def test_series_that_take_turns_are_told_apart() -> None:
    names = [f"h.{i}.{part}" for i in range(3) for part in ("attention", "mlp.fc1")]
    lines = shown_regions(make_plan(*map(region, names)))
    assert [line.split()[0] for line in lines] == ["h.0-2.attention", "h.0-2.mlp.fc1"]


def test_nested_series_stay_apart() -> None:
    names = [f"stages.{i}.blocks.{j}" for i in range(2) for j in range(2)]
    lines = shown_regions(make_plan(*map(region, names)))
    assert [line.split()[0] for line in lines] == ["stages.0.blocks.0-1", "stages.1.blocks.0-1"]


def test_a_shared_module_is_one_line_with_its_reason() -> None:
    reason = "called elsewhere in the step, too"
    lines = shown_regions(make_plan(*[region("encoder.group.0", reason=reason)] * 12))
    assert lines[0].split() == "encoder.group.0 (x12) keep 1.12 GiB - -".split()
    assert lines[1:] == ["  kept: called elsewhere in the step, too"]


def test_regions_with_different_reasons_are_told_apart() -> None:
    lines = shown_regions(make_plan(region("h.0", reason="a"), region("h.1", reason="b")))
    assert [line.split()[0] for line in lines] == ["h.0", "kept:", "h.1", "kept:"]


def test_one_region() -> None:
    assert shown_regions(make_plan(region("encoder"))) == [
        "encoder  keep    96.0 MiB      -          -"
    ]


def test_no_regions() -> None:
    text = format_plan(make_plan())
    assert "no regions: nothing in this step can be recomputed" in text
    assert "this plan" in text


def test_a_plan_with_the_least_in_it() -> None:
    full = make_plan(region("encoder"))
    plan = replace(
        full,
        model=replace(full.model, trainable_parameters=1_000),
        workload=replace(full.workload, batch={}, optimizer=None, notes=()),
        budget_bytes=0,
        predicted=replace(full.predicted, alive_at_peak={}),
        baselines=(),
    )
    text = format_plan(plan)
    assert "1,234,567,890 parameters, 1,000 trainable" in text
    assert "none: forward and backward only" in text
    assert "note:" not in text and "batch" not in text and "alive there" not in text
    assert "full checkpointing" not in text
    assert "\n\n\n" not in text and text.endswith("\n")


def test_long_names_and_notes_are_not_cut() -> None:
    name = "model." + "x" * 100
    full = make_plan(region(name))
    note = " ".join(["word"] * 40)
    text = format_plan(replace(full, workload=replace(full.workload, notes=(note,))))
    assert name in text
    assert text.count("word") == 40
    others = [block for block in text.split("\n\n") if name not in block]
    assert all(len(line) <= WIDTH for block in others for line in block.splitlines())


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0 s"),
        (4.2e-8, "0.0420 us"),
        (5.6e-6, "5.60 us"),
        (9.994e-4, "999 us"),
        (9.996e-4, "1.00 ms"),
        (0.034, "34.0 ms"),
        (0.9996, "1.00 s"),
        (1.234, "1.23 s"),
        (123.4, "123 s"),
        (4321.0, "4321 s"),
    ],
)
def test_seconds_have_three_digits(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected
