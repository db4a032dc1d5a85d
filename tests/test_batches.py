"""Batches come out of a model's config: the right arguments, real values, and clear refusals."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoModelForVisualQuestionAnswering,
    BartConfig,
    BertConfig,
    BertModel,
    GPT2Config,
    LEDConfig,
    LlamaConfig,
    RobertaConfig,
    Speech2TextConfig,
    ViltConfig,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from memfit.planner.batches import Batch, BatchError, make_batch

BERT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
BART: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def on_meta(auto_class: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = auto_class.from_config(config)
    return model.train()


def llama(**changes: Any) -> nn.Module:
    return on_meta(
        AutoModelForCausalLM,
        LlamaConfig(**{**BERT, "max_position_embeddings": 64, **changes}),
    )


def bert(auto_class: Any, **changes: Any) -> nn.Module:
    return on_meta(auto_class, BertConfig(**{**BERT, "max_position_embeddings": 64, **changes}))


def shapes(arguments: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in arguments.items()}


@pytest.mark.parametrize("value", [0, -3, 1.5, "8", True])
def test_numbers_that_make_no_batch_are_named(value: Any) -> None:
    with pytest.raises(BatchError, match=f"size .* not {value!r}"):
        Batch(size=value)
    with pytest.raises(BatchError, match=f"length .* not {value!r}"):
        Batch(length=value)


def test_causal_language_models_learn_their_input() -> None:
    arguments, description = make_batch(llama(), Batch(8, 32))
    assert description == "batch of 8 x 32 tokens made from LlamaConfig; labels = input_ids"
    assert shapes(arguments) == {"input_ids": (8, 32), "labels": (8, 32)}
    ids, labels = arguments["input_ids"], arguments["labels"]
    assert torch.equal(ids, labels)
    assert ids.data_ptr() != labels.data_ptr(), "a collator makes labels of their own"
    assert ids.device.type == "cpu"
    assert ids.dtype is torch.int64
    assert 0 <= ids.min() and ids.max() < 99
    again, _ = make_batch(llama(), Batch(8, 32))
    assert torch.equal(ids, again["input_ids"])


def test_special_tokens_stay_out_of_the_ids() -> None:
    model = llama(pad_token_id=5, bos_token_id=6, eos_token_id=7)
    ids = make_batch(model, Batch(4, 64))[0]["input_ids"]
    assert not set(ids.flatten().tolist()) & {5, 6, 7}


@pytest.mark.parametrize(("limit", "expected"), [(64, 64), (2048, 2048), (100_000, 2048)], ids=str)
def test_default_length_of_causal_models(limit: int, expected: int) -> None:
    arguments, _ = make_batch(llama(max_position_embeddings=limit))
    assert shapes(arguments)["input_ids"] == (1, expected)


def test_default_length_of_other_models() -> None:
    arguments, _ = make_batch(bert(AutoModelForMaskedLM, max_position_embeddings=600))
    assert shapes(arguments) == {"input_ids": (1, 512), "labels": (1, 512)}


def test_a_length_beyond_the_positions_is_refused() -> None:
    gpt2 = GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=40)
    with pytest.raises(BatchError, match=r"length of 41 is more than the 40 positions of GPT2LM"):
        make_batch(on_meta(AutoModelForCausalLM, gpt2), Batch(length=41))


def test_roberta_counts_positions_behind_its_padding() -> None:
    config = RobertaConfig(**BERT, max_position_embeddings=66, pad_token_id=1)
    model = on_meta(AutoModelForMaskedLM, config)
    assert shapes(make_batch(model)[0])["input_ids"] == (1, 64)
    with pytest.raises(BatchError, match="more than the 64 positions"):
        make_batch(model, Batch(length=65))


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        (AutoModelForSequenceClassification, {"labels": (3,)}),
        (AutoModelForTokenClassification, {"labels": (3, 16)}),
        (AutoModelForQuestionAnswering, {"start_positions": (3,), "end_positions": (3,)}),
    ],
    ids=["sequence", "token", "question"],
)
def test_labels_of_encoder_tasks(auto_class: Any, expected: dict[str, tuple[int, ...]]) -> None:
    arguments, _ = make_batch(bert(auto_class, num_labels=2), Batch(3, 16))
    assert shapes(arguments) == {"input_ids": (3, 16), **expected}
    if "labels" in arguments:
        assert set(arguments["labels"].flatten().tolist()) <= {0, 1}
    else:
        assert int(arguments["end_positions"].max()) == 15


def test_regression_and_flags_are_floating_point() -> None:
    regression = bert(AutoModelForSequenceClassification, num_labels=1)
    labels = make_batch(regression, Batch(3, 16))[0]["labels"]
    assert (tuple(labels.shape), labels.dtype, labels.device.type) == ((3,), torch.float32, "meta")
    flags = bert(
        AutoModelForSequenceClassification,
        num_labels=4,
        problem_type="multi_label_classification",
    )
    assert tuple(make_batch(flags, Batch(3, 16))[0]["labels"].shape) == (3, 4)


def test_encoder_decoders_get_two_sequences_that_end() -> None:
    config = BartConfig(**BART, max_position_embeddings=64, eos_token_id=2)
    arguments, description = make_batch(on_meta(AutoModelForSeq2SeqLM, config), Batch(2, 24))
    assert shapes(arguments) == {"input_ids": (2, 24), "labels": (2, 24)}
    assert description.endswith("made from BartConfig; labels of 2 x 24 tokens")
    assert arguments["labels"][:, -1].tolist() == [2, 2]
    assert int((arguments["labels"] == 2).sum()) == 2


def test_the_decoder_may_be_shorter() -> None:
    config = LEDConfig(
        **BART,
        attention_window=16,
        max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=32,
    )
    model = on_meta(AutoModelForSeq2SeqLM, config)
    assert shapes(make_batch(model, Batch(1, 128))[0]) == {"input_ids": (1, 128), "labels": (1, 32)}


def test_pictures_are_on_meta_and_have_no_length() -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        id2label={0: "a", 1: "b", 2: "c"},
        dtype=torch.bfloat16,
    )
    model = on_meta(AutoModelForImageClassification, config)
    arguments, description = make_batch(model, Batch(4))
    pixels = arguments["pixel_values"]
    assert tuple(pixels.shape) == (4, 3, 32, 32)
    assert (pixels.device.type, pixels.dtype) == ("meta", torch.bfloat16)
    assert arguments["labels"].tolist() == [0, 1, 2, 0]
    assert "4 x 3 x 32 x 32 pixels made from ViTConfig; labels = one of 3 classes" in description
    with pytest.raises(BatchError, match=r"pictures, which have no length: leave out .* 77"):
        make_batch(model, Batch(4, 77))


def test_whisper_gets_a_spectrogram_and_a_transcript() -> None:
    config = WhisperConfig(
        **BART,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = on_meta(AutoModelForSpeechSeq2Seq, config)
    arguments, _ = make_batch(model, Batch(2))
    assert shapes(arguments) == {"input_features": (2, 8, 60), "labels": (2, 20)}
    assert arguments["input_features"].device.type == "meta"
    assert shapes(make_batch(model, Batch(2, 7))[0])["labels"] == (2, 7)
    with pytest.raises(BatchError, match="length of 21 is more than the 20 decoder positions"):
        make_batch(model, Batch(2, 21))


def test_other_sound() -> None:
    speech = Speech2TextConfig(**BART, max_source_positions=50, max_target_positions=20)
    arguments, _ = make_batch(on_meta(AutoModelForSpeechSeq2Seq, speech))
    assert shapes(arguments) == {"input_features": (1, 50, 80), "labels": (1, 20)}
    wave = Wav2Vec2Config(
        **BERT, conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2), num_conv_pos_embeddings=4
    )
    model = on_meta(AutoModelForAudioClassification, wave)
    assert shapes(make_batch(model)[0]) == {"input_values": (1, 160_000), "labels": (1,)}
    assert shapes(make_batch(model, Batch(2, 400))[0])["input_values"] == (2, 400)


def test_classes_without_a_known_task_are_named() -> None:
    with torch.device("meta"):
        bare = BertModel(BertConfig(**BERT))
    with pytest.raises(BatchError, match=r"what BertModel is trained on; pass batch= .*labels"):
        make_batch(bare)
    vilt = on_meta(AutoModelForVisualQuestionAnswering, ViltConfig(**BERT))
    with pytest.raises(BatchError, match="ViltForQuestionAnswering"):
        make_batch(vilt)
    with pytest.raises(BatchError, match=r"Linear has no config .* pass batch="):
        make_batch(nn.Linear(2, 2))


class ForCausalLM(nn.Module):
    """A model of one's own that is called as those of transformers are."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        return input_ids


def test_masks_are_made_only_where_required() -> None:
    arguments, _ = make_batch(ForCausalLM(vocab_size=10), Batch(2, 3))
    assert arguments["attention_mask"].tolist() == [[1, 1, 1]] * 2
    with pytest.raises(BatchError, match=re.escape("ForCausalLM names no vocab_size")):
        make_batch(ForCausalLM())


def test_adapters_are_looked_through() -> None:
    class Adapted(nn.Module):
        def get_base_model(self) -> nn.Module:
            return llama()

    assert shapes(make_batch(Adapted(), Batch(1, 5))[0])["input_ids"] == (1, 5)
