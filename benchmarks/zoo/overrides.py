"""What the generic rules of ``configs`` do not reach, by model type. Tables of values alone.

Depends on transformers.
"""

from collections.abc import Callable
from typing import Any

import transformers

# What fields that are None become, where models need a number.
MISSING: dict[str, Any] = {
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "pad_token_id": 0,
    "num_key_value_heads": 4,
}

_TIME_SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 1,
}
_EFFICIENT_NET = {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320}
_IMAGE_TOKEN = 199
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Chameleon and Emu3 spell the codes of pictures with letters.
_CODES = {
    f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(i))}Z": 200 + i % 50 for i in range(256)
}
_CODES |= {"<image>": _IMAGE_TOKEN}
_EMU_CODES = {f"<|visual token {i:06}|>": 200 + i % 50 for i in range(256)}
_EMU_CODES |= {"<image>": _IMAGE_TOKEN, "<|extra_200|>": 198}
_VQGAN = {"base_channels": 32, "num_res_blocks": 1}
_DOTS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 24,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_PYRAMID = {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
_FOUR_LAYERS = {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]}
_TILES = {"image_grid_pinpoints": [[56, 56]]}

# Replaces what the rules made of a config's fields, also where it is a part of another one.
CONFIGS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 80},
    "align_vision_model": _EFFICIENT_NET,
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "audio-spectrogram-transformer": {"max_length": 64},
    "autoformer": _TIME_SERIES | {"label_length": 4},
    "bamba": {"attn_layer_indices": [1]},
    "beit": _FOUR_LAYERS,
    "bit": {"num_groups": 4},
    "blenderbot": {"encoder_layers": 3, "decoder_layers": 3},
    "blip-2": {"image_token_index": _IMAGE_TOKEN},
    "blt": {"use_cache": False},
    "chameleon": {"vocabulary_map": _CODES},
    "chameleon_vqgan": _VQGAN,
    "chmv2": {"backbone_config.return_class_token": True},
    "clap_audio_model": {"hidden_size": 256},
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE | {"mrope_section": [4, 2, 2]}}
    },
    "cvt": {"depth": [1, 2, 3]},
    "dac": {"encoder_hidden_size": 8, "hidden_size": 128},
    "data2vec-vision": _FOUR_LAYERS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "depth_pro": {
        "patch_size": 28,
        "image_model_config.image_size": 28,
        "patch_model_config.image_size": 28,
        "fov_model_config.image_size": 28,
        "intermediate_hook_ids": [2, 1],
    },
    "diffusion_gemma_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_text": _DOTS,
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "edgetam_vision_model": _PYRAMID,
    "efficientloftr": {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "out_features": [16, 16, 32, 64],
    },
    "efficientnet": _EFFICIENT_NET,
    "embedding_gemma2_text": {"head_dim": 16, "global_head_dim": 32, "num_key_value_heads": 2},
    "emu3": {"vocabulary_map": _EMU_CODES},
    "emu3_vqgan": _VQGAN | {"hidden_size": 128},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "fun_asr_nano_encoder": {"num_hidden_layers": 5, "num_timestamp_prediction_layers": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_text": {"head_dim": 16, "global_head_dim": 32},
    "gemma4_unified_text": {"head_dim": 16, "global_head_dim": 32},
    "glm5_next_text": {"index_kpool": 2},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granite4_vision": _TILES
    | {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 1, 2],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hiera": {"image_size": [64, 64]},
    "informer": _TIME_SERIES,
    "instructblip": {"image_token_index": _IMAGE_TOKEN},
    "instructblipvideo": {"video_token_index": _IMAGE_TOKEN},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus_vqgan": _VQGAN,
    "kosmos-2": {"latent_query_num": 8},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 64},
    "led": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {"intermediate_size": 256},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "longformer": {"attention_window": 8},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_vision": {"head_dim": 16},
    "mistral4": {"qk_nope_head_dim": 8},
    "mistral_large4_text": {"kv_source_layers": list(range(8))},
    "mllama_vision_model": {"vision_output_dim": 384},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 32, 64]},
    "mobilevitv2": {"image_size": 128},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "neucodec": {"quantization_dim": 128, "encoder_hidden_size": 4},
    "paddleocr_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]}},
    "patchtst": {"num_targets": 2},
    "perceiver": {"max_position_embeddings": 24},
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 25, "class_order": list(range(25))},
    "pp_doclayout_v3": {"x4_feat_dim": 8},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 196},
    "qwen2_audio": {"ignore_index": -100},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 196},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_shape": [4, 6],
        "axial_pos_embds_dim": [32, 32],
        "num_buckets": 4,
    },
    "sam2_hiera_det_model": {"hidden_size": 12, "global_attention_blocks": [2, 4, 6]},
    "sam2_vision_model": _PYRAMID,
    "sam3_vision_model": _PYRAMID,
    "sapiens2": {"head_config": {"upsample_out_channels": [16, 16], "conv_out_channels": [16]}},
    "seggpt": {
        "num_hidden_layers": 4,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1, 2, 3, 3],
    },
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 20, "no_token_index": 21},
    "slanet": {"max_text_length": 8},
    "slanext": {"max_text_length": 8},
    "step3p5": {"sliding_window": 8},
    "swin2sr": {"image_size": 16},
    "t5gemma2": {"mm_tokens_per_image": 4},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "t5gemma2_text": {"dropout_rate": 0.1},
    "textnet": {"hidden_sizes": [16, 16, 32, 32, 64], "stem_out_channels": 16},
    "time_series_transformer": _TIME_SERIES,
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8},
    "univnet": {"model_hidden_channels": 8},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [64, 64]},
    "uvdoc_backbone": {"out_features": [f"stage{i}" for i in range(1, 7)]},
    "vipllava": {"vision_feature_layers": [-2, -3]},
    "vitmatte": {"fusion_hidden_sizes": [64, 32, 16, 8]},
    "voxtral": {"audio_token_id": _IMAGE_TOKEN},
    "xcodec": {"codebook_dim": None},
    "xcodec2": {"quantization_dim": 128, "encoder_hidden_size": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
}

# Set on the small config of one class alone.
CLASSES: dict[str, dict[str, Any]] = {
    "Blip2ForImageTextRetrieval": {"qformer_config.use_qformer_text_input": True},
    "DetrForSegmentation": {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "HieraForPreTraining": {
        "decoder_hidden_size": 64,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
    },
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
}

# Fields that stay as they are.
KEPT: dict[str, tuple[str, ...]] = {
    "align_vision_model": ("in_channels", "out_channels"),
    "efficientnet": ("in_channels", "out_channels"),
    "gemma4_audio": ("subsampling_conv_channels",),
    "glpn": ("hidden_sizes", "decoder_hidden_size"),
    "superpoint": ("keypoint_decoder_dim",),
    "uvdoc": ("*",),
    "uvdoc_backbone": ("*",),
    "vibevoice_asr": ("acoustic_tokenizer_chunk_size",),
}


def _pair(config_class: str, first: str, second: str) -> Callable[[Callable[[str], Any]], Any]:
    def make(small_config: Callable[[str], Any]) -> Any:
        encoder, decoder = small_config(first), small_config(second)
        decoder.is_decoder = decoder.add_cross_attention = True
        made = getattr(transformers, config_class).from_encoder_decoder_configs(encoder, decoder)
        made.decoder_start_token_id, made.pad_token_id = 1, 0
        return made

    return make


# Configs made of others, with no default of their own.
COMPOSITES: dict[str, Callable[[Callable[[str], Any]], Any]] = {
    "encoder-decoder": _pair("EncoderDecoderConfig", "bert", "bert"),
    "vision-encoder-decoder": _pair("VisionEncoderDecoderConfig", "vit", "bert"),
    "speech-encoder-decoder": _pair("SpeechEncoderDecoderConfig", "wav2vec2", "bert"),
}

# Why a class cannot be built, by model type or by class name.
NOT_BUILDABLE: dict[str, str] = {
    "gemma4_assistant": "drafts from the keys and values of another model",
    "gemma4_unified_assistant": "drafts from the keys and values of another model",
    "omdet-turbo": "its backbone is a model of timm",
    "pp_ocrv5_server_det": "its default config leaves blocks without kernels",
    "pp_ocrv6_medium_det": "its default config leaves blocks without kernels",
    "pp_ocrv6_small_det": "the stages of its default backbone do not halve the width",
    "xlstm": "its kernels overwrite what backward needs",
}
