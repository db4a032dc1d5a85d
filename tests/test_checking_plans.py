"""``memfit check``: a plan replayed in the step of the model as it is now."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from memfit.integrations import cli
from memfit.planner import InfeasibleBudget, Plan, plan
from memfit.planner.batches import Batch, make_batch, remake_batch
from memfit.planner.budget import exact_bytes
from memfit.planner.document import RegionPlan, TensorSpec
from memfit.planner.errors import PlanError
from memfit.planner.preparing import Prepared, prepare
from memfit.planner.rechecking import prepare_again, recheck
from memfit.planner.writing import write_plan

Make = Callable[..., Any]
Output = pytest.CaptureFixture[str]

GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 2,
    "vocab_size": 48,
    "n_positions": 64,
}


def wide(made: tuple[Any, Any]) -> tuple[Any, Any]:
    """With a batch of which activations, not parameters, make the peak."""
    model, batch = made
    return model, {n: t.repeat(32, *[1] * (t.dim() - 1)) for n, t in batch.items()}


def planned(source: Prepared, budget: int) -> Plan:
    return write_plan(source, source.task.within(budget).solve("auto"))


def least(source: Prepared) -> int:
    with pytest.raises(InfeasibleBudget) as caught:
        planned(source, 1)
    return caught.value.minimum_bytes


# -- the same peak -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {}),
        ("gpt2", {"optimizer": "adamw", "max_grad_norm": 1.0}),
        ("llama", {"device": "h100", "autocast": "bfloat16", "keep_outputs": True}),
        ("vit", {"keep_gradients": True}),
        ("llama", {"sharding": "fsdp2", "world_size": 2, "reshard_after_forward": True}),
        ("llama", {"sharding": "fsdp2", "world_size": 2, "param_dtype": "bfloat16"}),
    ],
)
def test_a_plan_replayed_peaks_to_the_byte(name: str, options: dict[str, Any], make: Make) -> None:
    model, batch = wide(make(name, layers=4))
    source = prepare(model, batch, costs="roofline", **options)
    low = least(source)
    free = max(low, planned(source, 1 << 50).predicted.peak_bytes)
    again: Prepared | None = None
    done = set()
    for budget in (low, (9 * low + free) // 10, (low + free) // 2, 1 << 50):
        made = planned(source, budget)
        again = again or prepare_again(made, model)
        found = recheck(made, again)
        assert found.peak_bytes == found.planned_peak_bytes == made.predicted.peak_bytes
        assert found.peak_at == made.predicted.peak_at
        assert found.keeps_budget and found.budget_bytes == budget
        done |= {region.action for region in made.regions}
        done |= {"input" for region in made.regions if region.recompute_input}
    assert done >= {"keep", "selective", "input"}


def test_checkpoints_are_replayed_too(make: Make) -> None:
    model, batch = wide(make("vit"))
    made = plan(model, 1 << 50, batch, solver="full", costs="roofline")
    assert {region.action for region in made.regions} == {"checkpoint"}
    found = recheck(made, prepare_again(made, model))
    assert found.peak_bytes == made.predicted.peak_bytes


# -- what has changed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chained() -> tuple[Plan, Prepared]:
    """A plan for the smallest budget, in which regions are given their input again."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    source = prepare(model, Batch(64, 16), costs="roofline")
    made = planned(source, least(source))
    assert any(region.recompute_input for region in made.regions)
    return made, prepare_again(made, model)


def changed(made: Plan, index: int, **changes: Any) -> Plan:
    regions = list(made.regions)
    regions[index] = replace(regions[index], **changes)
    return replace(made, regions=tuple(regions))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: changed(p, -1, name="h.99"), "h.99 is no region of the step now"),
        (lambda p: replace(p, regions=p.regions[:-1]), "says nothing of the region transformer.h"),
        (lambda p: changed(p, -1, keep=("old.mm",)), "does not save old.mm now"),
        (lambda p: changed(p, -1, recompute=("old.mm",)), "does not save old.mm now"),
        (lambda p: changed(p, -1, recompute_input=("old",)), "is given other inputs by"),
        (
            lambda p: replace(p, regions=(*p.regions, RegionPlan("x", "keep", (), 0, 0, 0.0))),
            "x is no region of the step now",
        ),
        (
            lambda p: replace(p, model=replace(p.model, fingerprint="class:1-parameters:2")),
            "this model has another class",
        ),
    ],
    ids="region missing keep recompute input more model".split(),
)
def test_what_the_step_has_no_place_for_is_named(
    chained: tuple[Plan, Prepared], change: Callable[[Plan], Plan], expected: str
) -> None:
    made, prepared = chained
    with pytest.raises(PlanError, match=expected):
        recheck(change(made), prepared)


def test_another_model_is_refused_before_it_is_captured(
    chained: tuple[Plan, Prepared], make: Make
) -> None:
    model, _ = make("gpt2", layers=2)
    with pytest.raises(PlanError, match="has other parameter names, shapes or dtypes"):
        prepare_again(chained[0], model)


def test_a_choice_that_needs_more_than_the_budget_is_told(chained: tuple[Plan, Prepared]) -> None:
    made, prepared = chained
    kept = tuple(
        RegionPlan(region.name, "keep", (), 0, 0, 0.0)
        for region in made.regions
        if region.stored_bytes or region.recompute
    )
    found = recheck(replace(made, regions=kept), prepared)
    assert found.peak_bytes == made.predicted.unplanned_peak_bytes
    assert not found.keeps_budget


# -- the batch -----------------------------------------------------------------------------------


def test_a_made_batch_is_made_again_with_its_values(make: Make) -> None:
    for name, batch in (("llama", Batch(3, 24)), ("t5", Batch(2, 12)), ("vit", Batch(5))):
        model, _ = make(name, layers=1)
        arguments, _ = make_batch(model, batch)
        specs = {
            n: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for n, t in arguments.items()
        }
        again, note = remake_batch(model, specs)
        assert isinstance(again, dict) and list(again) == list(arguments)
        for key, tensor in arguments.items():
            assert again[key].device == tensor.device
            assert tensor.is_meta or torch.equal(again[key], tensor)
        assert note == ""


def test_what_is_not_made_is_on_meta_but_for_masks(make: Make) -> None:
    model, _ = make("bert", layers=1)
    specs = {
        "input_ids": TensorSpec((2, 8), "int64"),
        "attention_mask": TensorSpec((2, 8), "bool"),
        "inputs_embeds": TensorSpec((2, 8, 32), "bfloat16"),
    }
    batch, note = remake_batch(model, specs)
    assert isinstance(batch, dict)
    assert not batch["input_ids"].is_meta
    assert batch["attention_mask"].sum() == 14 and batch["attention_mask"].dtype is torch.bool
    assert batch["inputs_embeds"].is_meta and batch["inputs_embeds"].dtype is torch.bfloat16
    assert note == "values of attention_mask, inputs_embeds are not in the plan"


def test_arguments_without_names_stay_so(make: Make) -> None:
    model, _ = make("bert", layers=1)
    specs = {"0": TensorSpec((2, 8), "int64"), "1": TensorSpec((), "float32")}
    batch, _ = remake_batch(model, specs)
    assert isinstance(batch, tuple)
    assert [tuple(t.shape) for t in batch] == [(2, 8), ()]


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A plan, made as another class and dtype than the config's, and the config."""
    folder = tmp_path_factory.mktemp("check")
    config, path = folder / "config.json", folder / "plan.json"
    config.write_text(json.dumps(GPT2), encoding="utf-8")
    words = ["plan", str(config), "--batch-size", "4", "--quiet", "--device", "cpu", "-o"]
    words += [str(path), "--task", "token-classification", "--dtype", "bfloat16"]
    assert cli.main([*words, "--budget", "1GiB", "--costs", "roofline"]) == 0
    budget = Plan.load(path).predicted.peak_bytes * 9 // 10
    assert cli.main([*words, "--budget", str(budget), "--costs", "roofline"]) == 0
    return str(path), str(config)


def test_a_plan_holds(files: tuple[str, str], capsys: Output) -> None:
    assert cli.main(["check", *files]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert ", the same to the byte\n" in captured.out
    assert captured.out.endswith("the plan holds\n")
    made = Plan.load(files[0])
    assert (made.model.class_, made.model.dtype) == ("GPT2ForTokenClassification", "bfloat16")


def test_a_lower_limit_is_not_kept(files: tuple[str, str], capsys: Output) -> None:
    peak = Plan.load(files[0]).predicted.peak_bytes
    assert cli.main(["check", *files, "--max-peak", str(peak)]) == 0
    capsys.readouterr()
    assert cli.main(["check", *files, "--max-peak", str(peak - 1), "--json"]) == 3
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["schema"] == "memfit.check/1"
    assert not verdict["holds"]
    assert verdict["peak_bytes"] == verdict["planned_peak_bytes"] == peak
    assert verdict["reasons"] == [
        f"the peak of {exact_bytes(peak)} is above --max-peak, {exact_bytes(peak - 1)}"
    ]


def test_a_budget_that_is_not_kept_now_is_told(
    files: tuple[str, str], tmp_path: Path, capsys: Output
) -> None:
    made = Plan.load(files[0])
    peak = made.predicted.peak_bytes
    path = tmp_path / "plan.json"
    smaller = replace(made.predicted, peak_bytes=peak - 1024)
    replace(made, budget_bytes=peak - 1, predicted=smaller).save(path)
    assert cli.main(["check", str(path), files[1]]) == 3
    out = capsys.readouterr().out
    assert ", now 1.00 KiB (" in out and " %) more\n" in out
    assert "the plan does not hold:" in out
    assert f"the peak of {exact_bytes(peak)} is above the plan's budget" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dtype", "float32"], "has other parameter names, shapes or dtypes"),
        (["--task", "causal-lm"], "has another class"),
        (["--max-peak", "much"], "'much' is not a memory budget"),
    ],
)
def test_another_model_is_refused(
    files: tuple[str, str], capsys: Output, words: list[str], expected: str
) -> None:
    assert cli.main(["check", *files, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert expected in captured.err
