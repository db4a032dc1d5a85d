"""Makes a config of any model type small: few layers, narrow, with a vocabulary of 256.

Numbers follow ``rules``, by their names; what names do not tell is in ``overrides``. A config is
made anew from its small fields, so that it checks them and computes the others itself. Depends on
transformers.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from benchmarks.zoo import overrides, rules
from benchmarks.zoo.rules import INNER, LAYERS, POSITIONS, Fields

_FIRST_SPECIAL = 200  # special tokens above this are renamed to those from here up
_MOST_LAYERS = 8
_SKIPPED = {"id2label", "label2id", "chunk_size_feed_forward"}
_SPECIAL = re.compile(r".*(_token_ids?|_token_index|_token_idx|_index|_id|_ids|stream_[be]os_id)")
_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
)


def small_config(model_type: str) -> Any:
    """A small config of that type, the same at each call."""
    if model_type in overrides.COMPOSITES:
        return overrides.COMPOSITES[model_type](small_config)
    return complete(_shrunk(CONFIG_MAPPING[model_type](), {}))


def complete(config: Any) -> Any:
    """Sets what default configs lack and training asks for: the tokens that start and pad."""
    text = config.get_text_config(decoder=True)
    for part in (config, text, *filter(_is_config, vars(config).values())):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0
        if getattr(part, "decoder_start_token_id", None) is None:
            part.decoder_start_token_id = 0
    return config


def _shrunk(config: Any, ids: dict[int, int]) -> Any:
    """A small copy of a config; ``ids`` are the new names of special tokens so far."""
    if config.model_type == "timm_backbone":  # needs another library; DETR and its kin use it
        return _resnet(config)
    fields = _fields(config)
    small = {n: _shrunk(v, ids) if _is_config(v) else v for n, v in fields.items()}
    layers = _kept_layers(fields, len(getattr(config, "out_features", None) or ()))
    kept = overrides.KEPT.get(config.model_type, ())
    for name in fields:
        if name not in kept and "*" not in kept and not _is_config(fields[name]):
            small[name] = _small(name, fields[name], fields, layers, ids)
    if isinstance(rope := fields.get("rope_parameters"), dict):
        sections = "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())
        small["rope_parameters"] = _rope(rope, rules.head_dim(fields), sections)
    for name, value in overrides.CONFIGS.get(config.model_type, {}).items():
        _set(small, name, value)
    return _with_stages(config, _changed(type(config), small))


def _set(small: Fields, name: str, value: Any) -> None:
    """Overrides a field, or one of a part as in ``vision_config.hidden_size``."""
    part, _, inner = name.rpartition(".")
    if part:
        setattr(small[part], inner, value)
    else:
        small[name] = value


def _changed(config_class: Any, small: Fields) -> Fields:
    """The fields that are not what they are by default, of which the config may compute some."""
    try:
        default = vars(config_class())
    except Exception:  # a few have no valid default
        return small
    return {n: v for n, v in small.items() if n not in default or _is_config(v) or default[n] != v}


_CHOSEN = ("out_indices", "out_features")


def _with_stages(config: Any, changed: Fields) -> Any:
    """The small config; a backbone hands out as many stages as the one that it is made from."""
    made = type(config)(**changed)
    wanted, stages = getattr(config, "out_features", None), getattr(made, "stage_names", None)
    if not wanted or not stages or not changed.keys().isdisjoint(_CHOSEN):
        return made
    if not set(wanted) <= set(stages):
        wanted = stages[-len(wanted) :]
    return type(config)(**changed, out_features=list(wanted))


def _is_config(value: Any) -> bool:
    return isinstance(value, transformers.PreTrainedConfig)


def _fields(config: Any) -> Fields:
    """The fields that a config can be made from, as they are in this one."""
    names = [f.name for f in dataclasses.fields(config) if f.init and f.name not in _SKIPPED]
    names = [name for name in names if not name.startswith("_")]  # made by the config itself
    fields: Fields = {}
    for name in names:
        try:
            fields[name] = getattr(config, name)
        except Exception:  # differs from layer to layer, or has another name
            continue
    return fields


def _resnet(timm: Any) -> Any:
    features = [f"stage{i}" for i in timm.out_indices if i > 0]
    fields: Fields = {"hidden_sizes": [16, 32, 48, 64], "out_features": features or ["stage4"]}
    return transformers.ResNetConfig(embedding_size=16, depths=[1, 1, 1, 1], **fields)


# -- layers --------------------------------------------------------------------------------------


def _layer_count(fields: Fields) -> int:
    counts = (fields[n] for n in _LAYER_COUNTS if isinstance(fields.get(n), int))
    return next(counts, 0)


def _kept_layers(fields: Fields, least: int = 0) -> list[int]:
    """Which layers stay: one of each kind, and three or ``least`` of them."""
    count = _layer_count(fields)
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == count]
    kinds: dict[str, int] = {}
    if count > max(LAYERS, least):
        for i in range(count):
            kinds.setdefault(repr([v[i] for v in lists if not isinstance(v[i], float)]), i)
    kept = sorted(kinds.values())[:_MOST_LAYERS]
    spare = [i for i in range(count) if i not in kept]
    return sorted([*kept, *spare[: max(0, max(LAYERS, least) - len(kept))]])


# -- values --------------------------------------------------------------------------------------


def _small(name: str, value: Any, fields: Fields, layers: list[int], ids: dict[int, int]) -> Any:
    if value is None:
        return overrides.MISSING.get(name)
    if _SPECIAL.fullmatch(name):
        return _each(value, lambda v: _renamed(v, ids))
    if isinstance(value, (list, tuple)):
        small = _small_list(name, list(value), fields, layers)
        return small if _are_numbers(small) else type(value)(small)  # as JSON would have it
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name in _LAYER_COUNTS and layers:
        return min(value, len(layers))
    return rules.small_number(name, value, fields)


def _each(value: Any, rule: Callable[[int], int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_each(v, rule) for v in value)
    return rule(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _renamed(token: int, ids: dict[int, int]) -> int:
    """Another name for a special token outside of the vocabulary, the same in all parts."""
    if token < _FIRST_SPECIAL:
        return token
    return ids.setdefault(token, _FIRST_SPECIAL + len(ids))


# -- lists ---------------------------------------------------------------------------------------


def _small_list(name: str, value: list[Any], fields: Fields, layers: list[int]) -> list[Any]:
    count = _layer_count(fields)
    if count > len(layers) and len(value) == count:  # one entry for each layer
        return [_small_item(name, value[i], fields) for i in layers]
    if not _are_numbers(value):
        return value
    if re.fullmatch(r".*(indexes|indices|_layers|layer_idxs|idxs|hook_ids|_layer)", name):
        return _small_indices(value, len(layers)) if layers else value
    if re.fullmatch(r"depths?|.*(num_blocks|layers|_repeats|blocks_per_stage)", name):
        return [min(v, 2) for v in value]
    if re.fullmatch(r"(.*_)?(image_size|img_size)", name):
        return [rules.small_number("image_size", v, fields) for v in value]
    if _WIDTHS.fullmatch(name):
        if len(set(value)) == 1:
            return [min(v, rules.WIDTH) for v in value]
        return [_narrow(v, _divisor(fields)) for v in value]
    return value


def _are_numbers(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)


def _small_item(name: str, value: Any, fields: Fields) -> Any:
    """An entry of a list that has one for each layer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return rules.small_number(name.removesuffix("_per_layer"), value, fields)
    return value


def _small_indices(value: Sequence[int], count: int) -> list[int]:
    """As many of the last layers, each once while there are enough."""
    if max(value) < count:
        return list(value)
    first = max(0, count - len(value))
    return [min(first + i, count - 1) for i in range(len(value))]


_WIDTHS = re.compile(
    r"(?!kernel|image_|patch_size|pool).*(hidden_sizes|channels|dims?|widths?|encoder_sizes|dim_per_stage|channel_list)"
)


def _divisor(fields: Fields) -> int:
    """A power of two that makes the widest stage of a network of stages 128 or less."""
    widths = [
        v
        for name, value in fields.items()
        if _WIDTHS.fullmatch(name) and isinstance(value, (list, tuple))
        for v in value
        if isinstance(v, int)
    ]
    return 1 << max(0, (max(widths, default=1) - 1).bit_length() - INNER.bit_length() + 1)


def _narrow(width: int, divisor: int) -> int:
    return max(8, width // divisor) if width > 8 else width


# -- rotary positions ----------------------------------------------------------------------------


def _rope(value: Fields, head_dim: int, sections: bool) -> Fields:
    """Sections and factors for each frequency, of which there are half as many as dimensions."""
    small = dict(value)
    half = int(head_dim * value.get("partial_rotary_factor", 1.0)) // 2
    for key, entry in value.items():
        if isinstance(entry, dict):
            small[key] = _rope(entry, head_dim, sections)
        elif key.endswith("_factor") and isinstance(entry, (list, tuple)):
            small[key] = list(entry)[:half]
        elif key == "original_max_position_embeddings":
            small[key] = min(entry, POSITIONS)
    nested = any(isinstance(v, dict) for v in value.values())
    if "mrope_section" in value or (sections and not nested):
        small["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return small
