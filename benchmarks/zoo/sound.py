"""Arguments of models that hear or speak which ``batches`` cannot tell, by type or class name.

An argument that is None here is left out. Depends on torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.zoo.batches import Maker

Arguments = dict[str, Any]


def _transducer(m: "Maker") -> Arguments:
    labels = m.ids(2, 4, vocabulary=20)
    blanks = torch.full((2, 1), m.config.blank_token_id)
    arguments: Arguments = {"decoder_input_ids": torch.cat([blanks, labels], dim=1)}
    if m.name.endswith("ForTDT"):  # the loss of the others needs torchaudio
        arguments["labels"] = labels
    else:
        arguments["labels"] = None
    return arguments


def _contrasted(m: "Maker") -> Arguments:
    """Wav2Vec2: which frames are hidden, and which others each is told apart from."""
    if not m.name.endswith("ForPreTraining"):
        return {}
    sound = m.randn(2, 7680)
    frames = int(m.model._get_feat_extract_output_lengths(7680))
    others = torch.randint(0, 2 * frames, (2, frames, 4), generator=m.generator)
    hidden = (torch.arange(frames) % 2 == 0).repeat(2, 1)
    return {
        "input_values": sound,
        "mask_time_indices": hidden,
        "sampled_negative_indices": others,
    }


def _codes(m: "Maker") -> Arguments:
    """CSM: a token of text or one of each codebook for each step."""
    ids = m.ids(2, 24, m.config.num_codebooks, vocabulary=60)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones(2, 24)}


def _audio_frame(m: "Maker") -> Arguments:
    channels = m.config.decoder_config.num_channels
    codes = m.ids(2, 12, channels, vocabulary=60)
    labels = codes.transpose(1, 2).reshape(2 * channels, 12)
    return {"decoder_input_ids": codes, "labels": labels}


def _spectrogram(m: "Maker") -> Arguments:
    return {"input_values": m.randn(2, m.config.max_length, m.config.num_mel_bins)}


def _clap(m: "Maker") -> Arguments:
    return {"input_features": m.randn(2, 1, 64, 64), "is_longer": torch.tensor([[False], [False]])}


def _gemma_sound(m: "Maker") -> Arguments:
    return {"audio_mel": m.randn(2, 64, 128), "audio_mel_mask": torch.zeros(2, 64).bool()}


def _frames_of(width: int) -> Callable[["Maker"], Arguments]:
    return lambda m: {"input_features": m.randn(2, 64, width)}


def _text_and_codes(m: "Maker") -> Arguments:
    ids = m.ids(2, 24, m.config.num_codebooks + 1, vocabulary=60)
    return {"input_ids": ids, "labels": ids[..., 0].clone(), "attention_mask": torch.ones(2, 24)}


def _hidden_sound(m: "Maker") -> Arguments:
    if m.model_type.endswith("encoder"):
        return {"hidden_states": m.randn(2, 1, 7680)}
    return {"hidden_states": m.randn(2, m.config.hidden_size, 4)}


def _latents(m: "Maker") -> Arguments:
    return {"latents": m.randn(2, m.number("hidden_size", default=64), 4)}


def _music(m: "Maker") -> Arguments:
    if "decoder_input_ids" not in m.parameters:  # the decoder alone: a row for each codebook
        ids = m.ids(2 * m.config.num_codebooks, 24, vocabulary=60)
        return {"input_ids": ids, "attention_mask": None} | (
            {"labels": m.ids(2, 24, m.config.num_codebooks, vocabulary=60)}
            if "labels" in m.parameters
            else {}
        )
    decoder = m.config.decoder
    labels = m.ids(2, 12, decoder.num_codebooks, vocabulary=60)
    arguments: Arguments = {"labels": labels}
    if m.model_type == "musicgen_melody" and "input_features" in m.parameters:
        arguments["input_features"] = m.randn(2, 64, 12)
    return arguments


def _hundred_frames(m: "Maker") -> Arguments:
    mask = torch.ones(2, 100, dtype=torch.long)
    return {"input_features": m.randn(2, 128, 100), "input_features_mask": mask}


def _speech_latents(m: "Maker") -> Arguments:
    """Text, then the token that starts speech and one for each frame of it."""
    frames, config = 8, m.config
    ids = m.ids(2, 24)
    ids[:, -frames - 1] = config.audio_bos_token_id
    ids[:, -frames:] = config.audio_latent_token_id
    return {"input_ids": ids, "labels": m.randn(2, frames, m.number("latent_dim", default=32))}


def _read_aloud(m: "Maker") -> Arguments:
    mels = m.config.num_mel_bins
    if m.name.endswith("TextToSpeech"):
        return {
            "labels": m.randn(2, 32, mels),
            "speaker_embeddings": m.randn(2, m.config.speaker_embedding_dim),
        }
    if m.name.endswith("Model"):
        width = m.config.hidden_size
        return {
            "input_values": m.randn(2, 24, width),
            "decoder_input_values": m.randn(2, 12, width),
        }
    if m.name.endswith("SpeechToSpeech"):
        return {
            "labels": m.randn(2, 32, mels),
            "speaker_embeddings": m.randn(2, m.config.speaker_embedding_dim),
        }
    return {}


def _short_text(m: "Maker") -> Arguments:
    return {"input_ids": m.ids(2, 8)}


def _spoken(m: "Maker") -> Arguments:
    """FastSpeech2: two frames of the spectrogram for each token."""
    bins = m.number("num_mel_bins", default=80)
    return {
        "spectrogram_labels": m.randn(2, 48, bins),
        "duration_labels": torch.full((2, 24), 2),
        "pitch_labels": m.randn(2, 24, 1),
        "energy_labels": m.randn(2, 24, 1),
    }


SOUND: dict[str, Callable[["Maker"], Arguments]] = {
    "parakeet_rnnt": _transducer,
    "parakeet_tdt": _transducer,
    "nemotron3_5_asr": _transducer,
    "nemotron_asr_streaming": _transducer,
    "wav2vec2": _contrasted,
    "wav2vec2-conformer": _contrasted,
    "csm": _codes,
    "dia": _audio_frame,
    "audio-spectrogram-transformer": _spectrogram,
    "clap": _clap,
    "clap_audio_model": _clap,
    "gemma3n_audio": _gemma_sound,
    "gemma4_audio": _frames_of(128),
    "fun_asr_nano": _frames_of(560),
    "fun_asr_nano_encoder": _frames_of(560),
    "granite_speech5_ctc": _frames_of(320),
    "granite_speech5_encoder": _frames_of(320),
    "pocket_tts": _speech_latents,
    "gradium_phonon_tts": _speech_latents,
    "speecht5": _read_aloud,
    "musicgen": _music,
    "musicgen_melody": _music,
    "qwen3_asr": _hundred_frames,
    "qwen3_asr_encoder": _hundred_frames,
    "kyutai_speech_to_text": _text_and_codes,
    "vibevoice_acoustic_tokenizer_decoder": _hidden_sound,
    "vibevoice_acoustic_tokenizer_encoder": _hidden_sound,
    "mimi_decoder": _latents,
    "pocket_tts_audio_tokenizer_decoder": _latents,
    "voxtral_realtime": _short_text,
    "fastspeech2_conformer": _spoken,
    "fastspeech2_conformer_with_hifigan": _spoken,
}
