"""Models come from names, without weights and offline; what cannot be built is said in one line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from memfit.integrations.models import (
    TASKS,
    ModelError,
    build_model,
    default_task,
    quiet_transformers,
    tasks_of,
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write(folder: Path, values: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ModelError) as caught:
        build_model(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("model_type", "task"),
    [
        ("bert", "masked-lm"),
        ("roberta", "masked-lm"),
        ("llama", "causal-lm"),
        ("gpt2", "causal-lm"),
        ("mistral", "causal-lm"),
        ("t5", "seq2seq-lm"),
        ("bart", "seq2seq-lm"),
        ("vit", "image-classification"),
        ("whisper", "speech-seq2seq"),
        ("wav2vec2", "audio-classification"),
    ],
)
def test_default_tasks(model_type: str, task: str) -> None:
    assert default_task(CONFIG_MAPPING[model_type]()) == task


def test_the_config_may_name_its_class() -> None:
    bert: Any = CONFIG_MAPPING["bert"]
    assert (
        default_task(bert(architectures=["BertForTokenClassification"])) == "token-classification"
    )
    assert default_task(bert(architectures=["BertModel"])) == "masked-lm"
    assert default_task(bert(is_decoder=True)) == "causal-lm"
    with pytest.raises(ModelError, match=r"'sam' has no class for any of seq2seq-lm, .*plan\(\)"):
        default_task(CONFIG_MAPPING["sam"]())


def test_model_types_need_no_network() -> None:
    model = build_model("bert")
    assert type(model).__name__ == "BertForMaskedLM"
    assert model.training
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_types_with_several_classes_take_the_first() -> None:
    assert type(build_model("deit")).__name__ == "DeiTForImageClassification"


def test_decoders_can_start() -> None:
    assert build_model("t5").config.decoder_start_token_id == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "directory"])
def test_configs_on_disk(tmp_path: Path, as_file: bool) -> None:
    path = write(tmp_path, LLAMA | {"architectures": ["LlamaForSequenceClassification"]})
    model = build_model(str(path if as_file else tmp_path))
    assert type(model).__name__ == "LlamaForSequenceClassification"
    other = write(tmp_path, LLAMA, "tiny.json")
    assert type(build_model(str(other))).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        (None, None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", "fp32", torch.float32),
        (None, "bf16", torch.bfloat16),
        (None, "float16", torch.float16),
    ],
)
def test_dtype(tmp_path: Path, own: str | None, asked: str | None, expected: torch.dtype) -> None:
    path = write(tmp_path, LLAMA | ({"dtype": own} if own else {}))
    model = build_model(str(path), dtype=asked)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert torch.get_default_dtype() is torch.float32


def test_every_task_builds(tmp_path: Path) -> None:
    built: set[str] = set()
    bert = LLAMA | {"model_type": "bert"}
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    configs = [
        bert,
        LLAMA | {"model_type": "vit"},
        {"model_type": "whisper", "num_mel_bins": 8, "vocab_size": 99, "pad_token_id": 0}
        | sizes
        | heads,
        {"model_type": "bart", "vocab_size": 99} | sizes | heads,
    ]
    for values in configs:
        path = write(tmp_path, values)
        config = transformers.AutoConfig.from_pretrained(str(tmp_path))
        for task in tasks_of(config):
            build_model(str(path), task=task)
            built.add(task)
    assert built == set(TASKS)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    text = message("someone/llamma-7b")
    assert "'someone/llamma-7b'" in text
    assert "a directory, a config.json, a model type or a hub id" in text
    assert "nearest model types are llama, mllama," in text
    assert "out of reach" in text


def test_unreadable_configs(tmp_path: Path) -> None:
    assert "no config.json in the directory" in message(str(tmp_path))
    path = write(tmp_path, '{\n "model_type": }')
    text = message(str(tmp_path))
    assert str(path) in text and "line 2, column 16" in text
    write(tmp_path, [1])
    assert "holds list" in message(str(tmp_path))
    path.write_bytes(b"\xff\xfe")
    assert f"{path} cannot be read" in message(str(path))


def test_configs_of_nothing_known(tmp_path: Path) -> None:
    write(tmp_path, {"vocab_size": 3})
    assert "has no model_type" in message(str(tmp_path))
    write(tmp_path, {"model_type": "lama"})
    text = message(str(tmp_path))
    assert "'lama', unknown to transformers" in text and "llama" in text
    write(tmp_path, {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}})
    assert "trust_remote_code" in message(str(tmp_path))
    write(tmp_path, LLAMA | {"hidden_size": "wide"})
    assert "not a valid config of model type 'llama'" in message(str(tmp_path))
    write(tmp_path, LLAMA | {"model_type": "bert", "num_attention_heads": 3})
    assert "cannot be built for masked-lm" in message(str(tmp_path))


def test_tasks_and_dtypes_that_do_not_exist() -> None:
    assert "'poetry' is not a task; use one of seq2seq-lm" in message("bert", task="poetry")
    text = message("llama", task="masked-lm")
    assert "'llama' has no class for masked-lm; it has one for causal-lm," in text
    assert "'int8' is not a dtype of weights" in message("bert", dtype="int8")


def test_log_level_is_restored() -> None:
    before = transformers.logging.get_verbosity()
    with pytest.raises(RuntimeError), quiet_transformers():
        assert transformers.logging.get_verbosity() == logging.ERROR
        raise RuntimeError
    assert transformers.logging.get_verbosity() == before
