"""How small a number of a config becomes, by the name of its field.

Each rule gets the number and the other fields of the config. Widths all become :data:`WIDTH`, so
that parts which have to fit each other still do. Depends on the standard library.
"""

import re
from collections.abc import Callable
from typing import Any

LAYERS = 3
WIDTH = 64
INNER = 128
HEADS = 4
HEAD = 16
ROTARY = 8
VOCABULARY = 256
POSITIONS = 512

Fields = dict[str, Any]
Rule = Callable[[int, Fields], int]


def small_number(name: str, value: int, fields: Fields) -> int:
    """The value of a field of a small config, itself where no rule knows the name."""
    for pattern, rule in _RULES:
        if pattern.fullmatch(name):
            return rule(value, fields)
    return value


def head_dim(fields: Fields) -> int:
    """How many dimensions of a head turn with its position."""
    if isinstance(fields.get("qk_rope_head_dim"), int):
        return min(int(fields["qk_rope_head_dim"]), ROTARY)
    if isinstance(fields.get("head_dim"), int):
        return min(int(fields["head_dim"]), HEAD)
    heads = next(
        (fields[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in fields), 0
    )
    return WIDTH // _power(HEADS)(heads, fields) if isinstance(heads, int) and heads else HEAD


def _at_most(limit: int) -> Rule:
    return lambda value, fields: min(value, limit)


def _kept(value: int, fields: Fields) -> int:
    return value


def _power(limit: int) -> Rule:
    """The greatest power of two in both, so that it divides the widths."""
    return lambda value, fields: 1 << (min(value, limit).bit_length() - 1) if value > 0 else value


def _key_heads(value: int, fields: Fields) -> int:
    """As many as there are heads where that was so; else half of them, or one."""
    heads = [v for n, v in fields.items() if n.endswith(("attention_heads", "n_head", "num_heads"))]
    return _power(HEADS if value in heads else 2)(value, fields)


def _head_dim(value: int, fields: Fields) -> int:
    if value == fields.get("qk_rope_head_dim"):
        return ROTARY
    both = (fields.get("qk_rope_head_dim") or 0) + (fields.get("qk_nope_head_dim") or 0)
    return HEAD + ROTARY if value == both else min(value, HEAD)


def _image(value: int, fields: Fields) -> int:
    """Four patches a side, where the patches are known; else 64 pixels."""
    patch = fields.get("patch_size")
    if isinstance(patch, (list, tuple)):
        patch = max(patch)
    if not isinstance(patch, int) or patch < 1:
        return min(value, 64)
    if "depths" in fields:  # which halve a picture at each of four or five stages
        return min(value, 64)
    return min(value, patch * max(4, 32 // patch))


def _embed_dim(value: int, fields: Fields) -> int:
    """Eight for each head of the first stage, where heads double from stage to stage."""
    heads = fields.get("num_heads") or fields.get("num_attention_heads")
    if isinstance(heads, (list, tuple)):
        return min(value, 8 * int(heads[0]))
    return min(value, WIDTH // 4 if "depths" in fields else WIDTH)


def _window(value: int, fields: Fields) -> int:
    """Patches a side, which have to fit into the last stage of a picture too."""
    return min(value, 2) if "depths" in fields or "global_attn_indexes" in fields else value


def _mamba_heads(value: int, fields: Fields) -> int:
    """What the state space is wide, which is mostly twice the width, over the size of a head."""
    expand = next((v for n, v in fields.items() if re.fullmatch(r"(mamba_)?expand", n)), 2)
    return min(value, int(expand * WIDTH) // HEAD)


_LAST = r"(?:.*_)?"  # any words before the last one
_TABLE: tuple[tuple[str, Rule], ...] = (
    (r"num_(mel_bins|channels|labels|classes|input_channels|time_features)", _kept),
    (r"n_mels?|n_mel_bins|num_(static|dynamic)\w*|num_encoder_blocks|num_stages", _kept),
    (r"in_channels|out_channels|in_chans|audio_channels|channels|query_dim|dim_bbox", _kept),
    (
        r"max_2d_position_embeddings|input_dim|input_size|feature_size|input_feat_size|input_feat_per_channel",
        _kept,
    ),
    (r"feature_projection_input_dim|model_in_dim|spec_size|stem_num_channels", _kept),
    (_LAST + r"(kernel_size|patch_size|stride)", _kept),
    (r".*(vocab_size|vocabulary_size|n_words|vocab|vocab_size_\w*)", _at_most(VOCABULARY)),
    (r".*(codebook_size|codevectors_per_group|hash_buckets)", _at_most(VOCABULARY)),
    (r".*(num_embeddings|num_embeds|num_bpe_labels|num_wordpiece_labels)", _at_most(VOCABULARY)),
    (r".*max_(source|target)_positions", _at_most(64)),
    (_LAST + r"(positions|position_embeddings)", _at_most(POSITIONS)),
    (_LAST + r"(context_length|max_seq_len|n_ctx)", _at_most(POSITIONS)),
    (_LAST + r"(key_value_heads|num_kv_heads|n_head_kv)", _key_heads),
    (r"mamba_(n|num)_heads", _mamba_heads),
    (_LAST + r"(lora_rank|low_rank_dim|rank|lowrank)", _at_most(32)),
    (r"qk_nope_head_dim|v_head_dim|index_head_dim", _at_most(HEAD)),
    (r"qk_rope_head_dim|rotary_dim|qk_rope_dim", _at_most(ROTARY)),
    (r"qk_head_dim", _at_most(HEAD + ROTARY)),
    (r"head_dim", _head_dim),
    (_LAST + r"(head_dim|mamba_d_head|dim_head|head_size)", _at_most(HEAD)),
    (_LAST + r"(d_kv|d_head|kv_channels)", _at_most(HEAD)),
    (_LAST + r"(heads?|nhead)", _power(HEADS)),
    (_LAST + r"(intermediate_size\w*|intermediate_dim|intermediate)", _at_most(INNER)),
    (_LAST + r"(ffn_dim|d_ff|d_inner|n_inner|dff|dim_ff|ffn_hidden_size)", _at_most(INNER)),
    (_LAST + r"(feedforward_dim|feed_forward_dim|dim_feedforward)", _at_most(INNER)),
    (_LAST + r"(feed_forward_size|linear_units|mlp_dim|mlp_size|ffn_embed_dim)", _at_most(INNER)),
    (r"(num|n|moe_num|num_local|n_routed|num_routed|num_moe)_experts", _at_most(4)),
    (r"index_topk", _at_most(8)),
    (r".*(experts_per_tok(en)?|topk|top_k|moe_k|selected_experts|top_k_experts)", _at_most(2)),
    (r"n_group|num_expert_groups?|topk_group|(n|num)_shared_experts", _at_most(1)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", _at_most(1)),
    (r"zero_expert_num|(.*_)?(n_groups|ngroups)", _at_most(1)),
    (_LAST + r"(sliding_window|sliding_window_size|local_attention)", _at_most(8)),
    (_LAST + r"(attention_window|window_len|chunk_size|attn_chunk_length|block_size)", _at_most(8)),
    (_LAST + r"(state_size|d_state)", _at_most(HEAD)),
    (r"time_step_rank|mamba_dt_rank", _at_most(8)),
    (_LAST + r"image_size|img_size|crop_size", _image),
    (r"num_queries|num_denoising|two_stage_num_proposals|num_query_tokens", _at_most(8)),
    (r".*_latents|num_detection_tokens|num_landmarks|segment_means_seq_len", _at_most(8)),
    (r"num_frames|frames_per_clip|num_codebooks|num_quantizers", _at_most(4)),
    (r"window_size", _window),
    (r"num_pos_feats", _at_most(WIDTH // 2)),
    (r"train_num_points", _at_most(64)),
    (r"query_pre_attn_scalar", _at_most(HEAD)),
    (r"embed_dim|patch_embeds_hidden_size", _embed_dim),
    (_LAST + r"(hidden_size|d_model|n_embd|hidden|hidden_size_\w*)", _at_most(WIDTH)),
    (_LAST + r"(embedding_size|emb_size|embed_size|projection_size|proj_size)", _at_most(WIDTH)),
    (_LAST + r"(dim|dims|width|channels?|units|features|dimension)", _at_most(WIDTH)),
    (r"num_filters", _at_most(4)),  # doubled by each of up to six stages
    (_LAST + r"(latent_size|adapter_size|latents_size)", _at_most(WIDTH)),
    (r"pooler_output_size|output_hidden_size|upsample_groups|conv_dim\w*", _at_most(WIDTH)),
    (r".*(layers|layer|_blocks|depth)", _at_most(LAYERS)),
)
_RULES = tuple((re.compile(pattern), rule) for pattern, rule in _TABLE)
