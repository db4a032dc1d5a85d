"""``--lora``: the adapters are PEFT's, and every command that builds a model takes them."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from memfit.integrations import cli
from memfit.integrations.adapters import AdapterError, add_lora
from memfit.integrations.models import build_model
from memfit.planner import Batch, Plan, plan

# Of transformers, about what peft asks it.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LLAMA: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128,
    "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
OPTIONS: dict[str, Any] = {"device": "cpu", "costs": "roofline", "optimizer": "adamw"}
STEP = ["--device", "cpu", "--costs", "roofline"]


@pytest.fixture
def llama(tmp_path: Path) -> str:
    path = tmp_path / "llama.json"
    path.write_text(json.dumps({"model_type": "llama"} | LLAMA))
    return str(path)


def test_a_model_on_meta_is_planned_as_the_real_one_that_peft_adapts(llama: str) -> None:
    real = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    adapted: Any = peft.get_peft_model(real, peft.LoraConfig(r=4)).train()
    ours = plan(add_lora(build_model(llama), 4), 2**30, Batch(2, 16), **OPTIONS)
    theirs = plan(adapted, 2**30, Batch(2, 16), **OPTIONS)
    assert ours.model == theirs.model
    assert ours.predicted.peak_bytes == theirs.predicted.peak_bytes
    # q_proj and v_proj of two layers, 64 by 64, each with two matrices of rank 4.
    assert ours.model.trainable_parameters == 2 * 2 * 2 * 64 * 4


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        (("o_proj",), {"o_proj"}),
        (("q_proj", "up_proj"), {"q_proj", "up_proj"}),
        (
            ("all-linear",),
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
    ],
)
def test_targets_are_the_modules_that_train(
    llama: str, targets: tuple[str, ...], trained: set[str]
) -> None:
    model = add_lora(build_model(llama), 2, targets)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == trained
    assert all(p.is_meta for p in model.parameters())


def test_a_new_head_is_trained_whole(tmp_path: Path) -> None:
    path = tmp_path / "bert.json"
    path.write_text(json.dumps({"model_type": "bert"} | LLAMA))
    model = add_lora(build_model(str(path), task="sequence-classification"), 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")
    }


def test_every_command_that_builds_a_model_takes_it(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lowest(*lora: str) -> int:
        words = ["curve", llama, *STEP, "--optimizer", "adamw", "--points", "2", "--json", *lora]
        assert cli.main(words) == 0
        return int(json.loads(capsys.readouterr().out)["points"][0]["peak_bytes"])

    assert lowest("--lora", "r=2") < lowest()
    fit = ["fit", llama, *STEP, "--optimizer", "adamw", "--budget", "1MiB"]
    assert (cli.main([*fit, "--lora", "r=2"]), cli.main(fit)) == (0, 3)
    file = tmp_path / "plan.json"
    words = ["--budget", "1GiB", "-o", str(file)]
    assert cli.main(["plan", llama, *STEP, *words, "--lora", "r=2,targets=o_proj"]) == 0
    assert Plan.load(file).model.trainable_parameters == 2 * 2 * 64 * 2
    assert cli.main(["check", str(file), llama, "--lora", "r=2,targets=o_proj"]) == 0
    assert cli.main(["check", str(file), llama, "--lora", "r=4,targets=o_proj"]) == 2
    capsys.readouterr()
    assert cli.main(["check", str(file), llama]) == 2
    assert "512 parameters are trained); pass --lora as when it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["16", "r=0", "r=-1", "r=2,", "r=2,targets=", "r=2,alpha=3"])
def test_what_is_not_a_rank_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "llama", "--budget", "1GiB", "--lora", text]) == 2
    assert f"{text!r} is not a rank such as r=16" in capsys.readouterr().err


def test_modules_that_a_model_lacks_are_named(llama: str) -> None:
    with pytest.raises(AdapterError, match=r"cannot have these adapters: .*nope.*targets=q_proj"):
        add_lora(build_model(llama), 2, ["nope"])


def test_without_peft_the_command_that_helps_is_named(
    llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert cli.main(["fit", llama, "--budget", "1GiB", "--device", "cpu", "--lora", "r=2"]) == 2
    assert "`pip install peft`" in capsys.readouterr().err
