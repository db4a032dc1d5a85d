"""Arguments of models that see which ``batches`` cannot tell, by model type or class name.

An argument that is None here is left out. Depends on torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.zoo.batches import Maker

Arguments = dict[str, Any]


def _q_former(m: "Maker") -> Arguments:
    return {
        "qformer_input_ids": m.ids(2, 8),
        "qformer_attention_mask": torch.ones(2, 8, dtype=torch.long),
    }


def _lxmert(m: "Maker") -> Arguments:
    return {
        "visual_feats": m.randn(2, 8, m.config.visual_feat_dim),
        "visual_pos": m.randn(2, 8, m.config.visual_pos_dim),
    }


def _visual_bert(m: "Maker") -> Arguments:
    return {
        "visual_embeds": m.randn(2, 8, m.config.visual_embedding_dim),
        "visual_attention_mask": torch.ones(2, 8, dtype=torch.long),
        "labels": m.ids(2, 32) if m.name.endswith("PreTraining") else None,
    }


def _flattened(m: "Maker") -> Arguments:
    """Pix2Struct: the row and the column of each patch, then its pixels."""
    width = m.layer("patch", torch.nn.Linear).in_features
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float()
    return {"flattened_patches": torch.cat([places.repeat(2, 1, 1), m.randn(2, 16, width)], dim=-1)}


def _with_points(m: "Maker") -> Arguments:
    return {"input_points": torch.tensor([[[[20.0, 30.0]]]] * 2)}


def _flava(m: "Maker") -> Arguments:
    if not m.name.endswith("PreTraining"):
        return {}
    ids, patches = m.ids(2, 24), (m.config.image_config.image_size // 16) ** 2
    return {
        "input_ids": ids,
        "input_ids_masked": ids.flip(0),
        "codebook_pixel_values": m.randn(2, 3, 8 * 4, 8 * 4),
        "bool_masked_pos": torch.ones(2, patches, dtype=torch.bool),
        "mlm_labels": ids,
        "itm_labels": torch.tensor([0, 1]),
        "return_loss": True,
    }


def _idefics(m: "Maker") -> Arguments:
    return {"image_attention_mask": torch.ones(2, 24, 1, dtype=torch.long)}


def _square_patches(m: "Maker") -> Arguments:
    """Kimi: a picture for each patch."""
    patches = m.randn(32, 3, 14, 14)
    return (
        {"pixel_values": patches} if "pixel_values" in m.parameters else {"hidden_states": patches}
    )


def _merged(m: "Maker") -> Arguments:
    name = "image_merge_sizes" if "image_merge_sizes" in m.parameters else "merge_sizes"
    return {name: torch.tensor([2, 2])}


def _line(height: int) -> Callable[["Maker"], Arguments]:
    """A line of text is wide and as high as its reader wants it."""
    return lambda m: {"pixel_values": m.randn(2, 3, height, 128)}


def _kosmos(m: "Maker") -> Arguments:
    count = m.config.latent_query_num
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, 1 : 1 + count] = True
    return {"image_embeds_position_mask": mask}


def _mllama(m: "Maker") -> Arguments:
    if "cross_attention_mask" not in m.parameters or not hasattr(m.config, "vision_config"):
        return {} if "input_ids" in m.parameters else _tiles_of(m, m.config)
    vision = m.config.vision_config
    tiles = vision.max_num_tiles
    mask = torch.ones(2, 25, 1, tiles, dtype=torch.long)
    return _tiles_of(m, vision) | {"cross_attention_mask": mask}


def _tiles_of(m: "Maker", vision: Any) -> Arguments:
    side, tiles = vision.image_size, vision.max_num_tiles
    return {
        "pixel_values": m.randn(2, 1, tiles, 3, side, side),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long),
    }


def _robot(m: "Maker") -> Arguments:
    config, vision = m.config, m.config.vlm_config.vision_config
    side, ids = vision.image_size, m.ids(2, 40)
    ids[:, 1 : 1 + (side // vision.patch_size) ** 2] = config.vlm_config.image_token_id
    if "action_embeds" in m.parameters:
        width = config.dit_config.hidden_size
        return {"action_embeds": m.randn(2, 8, width), "input_ids": ids} | _camera(m, side)
    return _camera(m, side) | {
        "input_ids": ids,
        "state": m.randn(2, config.max_state_dim),
        "actions": m.randn(2, config.chunk_size, config.max_action_dim),
    }


def _camera(m: "Maker", side: int) -> Arguments:
    return {
        "pixel_values": m.randn(2, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }


def _task(m: "Maker") -> Arguments:
    """OneFormer: which task, and texts that describe what is to be found."""
    length = m.config.task_seq_len
    return {"task_inputs": m.ids(2, length, vocabulary=60).float()}


def _patches(m: "Maker") -> Arguments:
    """Fuyu: flat patches for each example."""
    return {"pixel_values": m.randn(2, 8, 3 * m.config.patch_size**2)}


def _col_qwen(m: "Maker") -> Arguments:
    return {"pixel_values": m.flat_patches().reshape(2, 16, -1)}


def _two_resolutions(m: "Maker") -> Arguments:
    side = m.config.high_res_vision_config.image_size
    return {"high_res_pixel_values": m.randn(2, 3, side, side)}


def _large_picture(m: "Maker") -> Arguments:
    return {"pixel_values": m.randn(2, 3, 112, 112)}


def _gemma_patches(m: "Maker") -> Arguments:
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    width = 3 * m.number("patch_size", default=16) ** 2
    name = "pixel_position_ids" if "pixel_position_ids" in m.parameters else "image_position_ids"
    return {"pixel_values": m.randn(2, 36, width), name: places.repeat(2, 1, 1)}


def _tiles(m: "Maker") -> Arguments:
    side = m.config.vision_config.image_size
    return {
        "pixel_values": m.randn(2, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }


def _row_of_patches(m: "Maker") -> Arguments:
    patch = m.config.patch_size
    return {
        "pixel_values": m.randn(1, 3, patch, patch * 32),
        "target_sizes": torch.tensor([[4, 4]] * 2),
    }


def _classes(m: "Maker") -> Arguments:
    """OmDet: the names of classes and a task, as text."""
    return {
        "classes_input_ids": m.ids(4, 8),
        "classes_attention_mask": torch.ones(4, 8, dtype=torch.long),
        "tasks_input_ids": m.ids(2, 8),
        "tasks_attention_mask": torch.ones(2, 8, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
    }


def _paddle(m: "Maker") -> Arguments:
    return {"pixel_values": m.randn(32, 3, 14, 14)}


def _example(m: "Maker") -> Arguments:
    """SegGPT: another picture with its mask says what to look for."""
    height, width = m.image_shape()[1:]
    return {
        "pixel_values": m.randn(2, 3, height // 2, width),
        "prompt_pixel_values": m.randn(2, 3, height // 2, width),
        "prompt_masks": m.randn(2, 3, height // 2, width),
        "labels": m.randn(2, 3, height // 2, width),
    }


def _clip(m: "Maker") -> Arguments:
    return {"pixel_values": m.randn(1, m.config.num_frames, 3, 64, 64), "input_ids": m.ids(1, 24)}


def _merged_patches(m: "Maker") -> Arguments:
    """Inkling: patches that are merged lie side by side."""
    side = m.number("patch_size", default=20) * 2
    return {"pixel_values": m.randn(32, side, side, 3)}


def _masked_video(m: "Maker") -> Arguments:
    config = m.config
    if "bool_masked_pos" not in m.parameters:
        return {}
    patches = (config.image_size // config.patch_size) ** 2
    count = config.num_frames // config.tubelet_size * patches
    return {"bool_masked_pos": (torch.arange(count) % 2 == 0).repeat(2, 1)}


PICTURES: dict[str, Callable[["Maker"], Arguments]] = {
    "instructblip": _q_former,
    "instructblipvideo": _q_former,
    "lxmert": _lxmert,
    "visual_bert": _visual_bert,
    "pix2struct": _flattened,
    "sam": _with_points,
    "sam2": _with_points,
    "sam_hq": _with_points,
    "flava": _flava,
    "idefics": _idefics,
    "kimi_k25": _square_patches,
    "kimi_k25_vision": _square_patches,
    "video_llama_3": _merged,
    "video_llama_3_vision": _merged,
    "pp_ocrv5_mobile_rec": _line(96),
    "pp_ocrv5_server_rec": _line(48),
    "pp_ocrv6_small_rec": _line(48),
    "pp_ocrv6_medium_rec": _line(48),
    "kosmos-2": _kosmos,
    "mllama": _mllama,
    "pi0": _robot,
    "oneformer": _task,
    "fuyu": _patches,
    "colqwen2": _col_qwen,
    "deepseek_vl_hybrid": _two_resolutions,
    "depth_pro": _large_picture,
    "gemma4_vision": _gemma_patches,
    "inkling2": _merged_patches,
    "inkling2_vision": _merged_patches,
    "videomae": _masked_video,
    "LxmertForQuestionAnswering": lambda m: _lxmert(m) | {"labels": torch.tensor([0, 1])},
    "granite_docling": _tiles,
    "minicpm_ocr_vision": _row_of_patches,
    "minicpmv4_7_vision": _row_of_patches,
    "omdet-turbo": _classes,
    "paddleocr_vl": _paddle,
    "seggpt": _example,
    "tvp": _clip,
}
