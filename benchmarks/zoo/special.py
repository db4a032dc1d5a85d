"""Arguments that the generic rules of ``batches`` cannot tell, by model type or class name.

An argument that is None here is left out. Depends on torch, ``pictures``
and ``sound``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.zoo.pictures import PICTURES
from benchmarks.zoo.sound import SOUND

if TYPE_CHECKING:
    from benchmarks.zoo.batches import Maker

Arguments = dict[str, Any]


def _series(m: "Maker") -> Arguments:
    config = m.config
    past = config.context_length + max(config.lags_sequence)
    future = config.prediction_length
    return {
        "past_values": m.randn(2, past),
        "past_time_features": m.randn(2, past, max(1, config.num_time_features)),
        "past_observed_mask": torch.ones(2, past),
        "future_values": m.randn(2, future),
        "future_time_features": m.randn(2, future, max(1, config.num_time_features)),
    }


def _patched_series(m: "Maker") -> Arguments:
    config = m.config
    channels, past = config.num_input_channels, config.context_length
    arguments: Arguments = {"past_values": m.randn(2, past, channels)}
    if "future_values" in m.parameters:
        arguments["future_values"] = m.randn(2, config.prediction_length, channels)
    if "target_values" in m.parameters:
        classes = m.name.endswith("Classification")
        arguments["target_values"] = torch.arange(2) if classes else m.randn(2, config.num_targets)
    return arguments


def _timesfm(m: "Maker") -> Arguments:
    length = m.config.context_length
    arguments: Arguments = {
        "past_values": m.randn(2, length),
        "future_values": m.randn(2, m.config.horizon_length),
    }
    if "past_values_padding" in m.parameters:
        arguments["past_values_padding"] = torch.zeros(2, length, dtype=torch.long)
    if "freq" in m.parameters:
        arguments["freq"] = torch.zeros(2, 1, dtype=torch.long)
    return arguments


def _decisions(m: "Maker") -> Arguments:
    return {
        "states": m.randn(2, 8, m.config.state_dim),
        "actions": m.randn(2, 8, m.config.act_dim),
        "rewards": m.randn(2, 8, 1),
        "returns_to_go": m.randn(2, 8, 1),
        "timesteps": torch.arange(8).repeat(2, 1),
        "attention_mask": torch.ones(2, 8),
    }


def _same_target(m: "Maker") -> Arguments:
    labels = m.ids(2, 12)
    return {"labels": labels, "decoder_input_ids": labels.clone()}


def _tapas(m: "Maker") -> Arguments:
    return {"token_type_ids": torch.zeros(2, 24, len(m.config.type_vocab_sizes), dtype=torch.long)}


def _without(*names: str) -> Callable[["Maker"], Arguments]:
    return lambda m: dict.fromkeys(names)


def _splinter(m: "Maker") -> Arguments:
    starts = torch.full((2, 1), 3)
    if not m.name.endswith("PreTraining"):
        return {}
    return {
        "question_positions": torch.ones(2, 1, dtype=torch.long),
        "start_positions": starts,
        "end_positions": starts + 2,
    }


def _questions(m: "Maker") -> Arguments:
    """Longformer: three separators in each example."""
    if not m.name.endswith(("QuestionAnswering", "MultipleChoice")):
        return {}
    ids = m.ids(2, 24)
    ids[:, [8, 9, 23]] = m.config.sep_token_id
    return {"input_ids": ids}


def _draft(m: "Maker") -> Arguments:
    width, layers = m.config.hidden_size, len(m.config.target_layer_ids)
    return {
        "noise_embeds": m.randn(2, 8, width),
        "context_hidden_states": m.randn(2, 24, width * layers),
        "attention_mask": torch.ones(2, 32, dtype=torch.long),
    }


def _decision(m: "Maker") -> Arguments:
    return {
        "input_ids": m.ids(1, 24),
        "marks": torch.tensor([[12, 23]]),
        "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 1]]),
    }


def _hidden_words(m: "Maker") -> Arguments:
    vectors = m.randn(2, 24, m.config.d_model)
    return {"inputs": vectors, "attention_mask": torch.ones(2, 24)} if m.requires("inputs") else {}


_OTHERS: dict[str, Callable[["Maker"], Arguments]] = {
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "patchtst": _patched_series,
    "patchtsmixer": _patched_series,
    "timesfm": _timesfm,
    "timesfm2_5": _timesfm,
    "decision_transformer": _decisions,
    "fsmt": _same_target,
    "tapas": _tapas,
    "pop2piano": _without("input_features"),
    "splinter": _splinter,
    "pp_formulanet": _same_target,
    "speech-encoder-decoder": _without("input_features"),
    "BlipForQuestionAnswering": _without("decoder_input_ids"),
    "Sapiens2ForPoseEstimation": _without("labels"),
    "granite4_vision": _without("pixel_values", "image_sizes"),
    "muse_glimmer_assistant": _draft,
    "longformer": _questions,
    "JevForDecision": _decision,
    "perceiver": _hidden_words,
    "SeamlessM4TModel": _without("input_features"),
    "SeamlessM4Tv2Model": _without("input_features"),
    "ShieldGemma2ForImageClassification": _without("labels"),
    "xcodec2": lambda m: {"input_features": m.randn(2, 24, 160)},
    "pe_audio": _without("padding_mask"),
    "pe_audio_encoder": _without("padding_mask"),
    "granite_speech": _without("input_features_mask"),
    "granite_speech_plus": _without("input_features_mask"),
    "grounding-dino": _without("labels"),
    "mm-grounding-dino": _without("labels"),
    # Text alone: what stands for a picture or a sound is for their processors to tell.
    "dots3_note": _without("input_features"),
    "molmo2": _without("pixel_values"),
    "nemotron_h_omni": _without("pixel_values", "image_grid_hw", "input_features"),
    "glm_image": _without("pixel_values", "image_grid_thw"),
    "inkling_mm_model": _without("pixel_values"),
    "musicflamingo": _without("input_features", "input_features_mask"),
    "neomme": _without("pixel_values"),
}

BATCHES = _OTHERS | PICTURES | SOUND
