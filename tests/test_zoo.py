"""The small models of all classes of transformers: listed, built and trained for a step."""

from typing import Any

import pytest
import torch

from benchmarks.zoo import ModelClass, NotBuildable, build, trainable_classes

# One of each kind: a decoder, an encoder, both, pictures, sound, pictures in text, experts, states.
BUILT = (
    ModelClass("llama", "LlamaForCausalLM"),
    ModelClass("bert", "BertForTokenClassification"),
    ModelClass("t5", "T5ForConditionalGeneration"),
    ModelClass("swin", "SwinForImageClassification"),
    ModelClass("wav2vec2", "Wav2Vec2ForCTC"),
    ModelClass("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    ModelClass("mixtral", "MixtralForCausalLM"),
    ModelClass("mamba", "MambaForCausalLM"),
)


def _leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [t for v in value.values() for t in _leaves(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _leaves(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_lists_one_class_for_each_model_type_or_all() -> None:
    one, every = trainable_classes(), trainable_classes(every=True)
    types = [c.model_type for c in one]
    assert len(types) == len(set(types)) > 600
    assert set(one) <= set(every) and len(every) == len(set(every)) > 1500
    assert {c.model_type for c in every} == set(types)


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("bart", "BartForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
        ("detr", "DetrForObjectDetection"),
        ("llava", "LlavaForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
    ],
)
def test_prefers_the_class_that_computes_a_loss(model_type: str, class_name: str) -> None:
    assert ModelClass(model_type, class_name) in trainable_classes()


@pytest.mark.parametrize("model_class", BUILT, ids=lambda c: c.class_name)
def test_trains_a_small_model_of_a_class(model_class: ModelClass) -> None:
    model, batch = build(model_class)
    assert model.training
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) < 5_000_000
    assert {p.dtype for p in parameters} == {torch.float32}
    loss = model(**batch).loss
    assert loss.dim() == 0 and torch.isfinite(loss)
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in parameters)


def test_builds_the_same_each_time() -> None:
    (model, batch), (again, same) = build(BUILT[5]), build(BUILT[5])
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert batch.keys() == same.keys()
    assert all(torch.equal(a, b) for a, b in zip(_leaves(batch), _leaves(same), strict=True))


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (ModelClass("layoutlmv2", "LayoutLMv2Model"), "detectron2"),
        (ModelClass("bark", "BarkModel"), "no forward"),
        (ModelClass("voxtral_realtime_text", "VoxtralRealtimeTextModel"), "exports no such class"),
    ],
)
def test_says_why_a_class_cannot_be_built(model_class: ModelClass, reason: str) -> None:
    with pytest.raises(NotBuildable, match=reason):
        build(model_class)
