"""Makes the arguments of one training step from a model's ``forward`` and config.

What arguments mean is told by their names, and how large they are by the config or by the layer
that they enter. Depends on torch, ``inspecting``, ``labels``
and ``special``.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.classes import ModelClass
from benchmarks.zoo.inspecting import (
    all_configs,
    first,
    has_token,
    method_requires,
    methods_of,
    special_ids,
    tensors,
)
from benchmarks.zoo.labels import labels_of
from benchmarks.zoo.special import BATCHES

SIZE = 2
LENGTH = 24
GRID = 4  # patches a side of a picture that is given as patches
_SIDE = 64
_FRAMES = 64  # of a spectrogram
_SAMPLES = 7680  # a whole number of the frames of codecs

Arguments = dict[str, Any]


def make_batch(model: nn.Module, model_class: ModelClass) -> Arguments:
    """The arguments of one training step, labels included; the same at each call."""
    return Maker(model, model_class).make()


class Maker:
    """One model, and what its arguments are made of."""

    def __init__(self, model: Any, model_class: ModelClass) -> None:
        self.model = model
        self.name = model_class.class_name
        self.model_type = model_class.model_type
        self.config: Any = self.model.config
        self.text: Any = self.config.get_text_config(decoder=True)
        self.special = special_ids(self.config) | special_ids(self.text)
        limits = first(self.text, ("max_position_embeddings", "n_positions"))
        self.length = min(LENGTH, limits) if isinstance(limits, int) and limits > 0 else LENGTH
        self.parameters = inspect.signature(self.model.forward).parameters
        self.mels_first = self._mels_first()
        self.generator = torch.Generator().manual_seed(1234)

    def make(self) -> Arguments:
        arguments: Arguments = {}
        for key in (self.model_type, self.name):
            if key in BATCHES:
                arguments |= BATCHES[key](self)
        special = set(arguments)
        for argument, maker in _MAKERS.items():
            if argument in self.parameters and argument not in arguments:
                arguments[argument] = maker(self)
        if "input_ids" not in special:
            self._add_placeholders(arguments)
        self._add_masks(arguments)
        arguments |= {k: v for k, v in labels_of(self, arguments).items() if k not in arguments}
        if self.name.endswith("ForMultipleChoice"):
            _choose(arguments)
        return {k: v for k, v in arguments.items() if v is not None}

    # -- what is known of the model --------------------------------------------------------------

    def requires(self, argument: str) -> bool:
        parameter = self.parameters.get(argument)
        return parameter is not None and parameter.default is inspect.Parameter.empty

    def main(self) -> str:
        return str(getattr(self.model, "main_input_name", "input_ids"))

    def number(self, *names: str, default: int) -> int:
        """The first of the attributes of the config or of its parts that is set."""
        for config in all_configs(self.config):
            value = first(config, names)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return default

    def token(self, names: tuple[str, ...]) -> int | None:
        """The token that stands for a picture or a sound, which a part may name."""
        found = (first(config, names) for config in all_configs(self.config))
        return next((token for token in found if token is not None), None)

    def lacks(self, part: str) -> bool:
        """Whether a model that may see or hear has nothing to do that with."""
        return part in vars(self.config) and getattr(self.config, part) is None

    def part(self, *names: str) -> Any:
        """The first of the parts of the config that there is, else the config itself."""
        for name in names:
            if hasattr(getattr(self.config, name, None), "model_type"):
                return getattr(self.config, name)
        return self.config

    def vision(self) -> Any:
        return self.part(
            "vision_config", "backbone_config", "encoder", "image_encoder", "vq_config"
        )

    def _mels_first(self) -> bool:
        """Whether a spectrogram enters a convolution over time as it is."""
        conv = self.layer("", nn.Conv1d)
        if self.model_type.startswith(("qwen2_5_omni", "qwen3_omni", "qwen3_asr")):
            return True
        return (
            conv is not None and conv.in_channels == self.mels() and "Speech2Text" not in self.name
        )

    def mels(self) -> int:
        """The channels of a spectrogram."""
        names = ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel", "n_mels")
        others = ("input_dim", "feature_size", "input_feat_size", "input_size")
        return self.number(*names, default=0) or self.number(*others, default=80)

    def image_shape(self) -> tuple[int, int, int]:
        vision = self.vision()
        channels = first(vision, ("num_channels", "in_channels", "in_chans")) or 3
        side = first(vision, ("image_size", "img_size", "crop_size"))
        side = side or first(self.config, ("image_size", "img_size")) or _SIDE
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return channels if isinstance(channels, int) else 3, int(height), int(width)

    def takes_flat_patches(self) -> bool:
        return not self.parameters.keys().isdisjoint(
            ("image_grid_thw", "grid_thw", "image_grid_hw")
        )

    def layer(self, word: str, *kinds: type[nn.Module]) -> Any:
        """The first layer of these kinds with the word in its name."""
        for name, module in self.model.named_modules():
            if isinstance(module, kinds) and word in name:
                return module
        return None

    # -- values ----------------------------------------------------------------------------------

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def ids(self, *shape: int, vocabulary: int | None = None) -> torch.Tensor:
        """Ordinary tokens: special ones are from 200 up, below 5 or named by the config."""
        size = (
            vocabulary
            or first(self.text, ("vocab_size",))
            or self.number("vocab_size", default=200)
        )
        low = max(0, min(5, size - 2))
        ordinary = [i for i in range(low, min(size, 190)) if i not in self.special] or [low]
        picks = torch.randint(len(ordinary), shape, generator=self.generator)
        return torch.tensor(ordinary)[picks]

    # -- arguments -------------------------------------------------------------------------------

    def input_ids(self) -> torch.Tensor | None:
        sound = self.main() in ("input_features", "input_values")
        if sound and not self.requires("input_ids") and not has_token(self.config, "audio"):
            return None
        ids = self.ids(SIZE, self.length)
        end = first(self.config, ("eos_token_id",))
        if getattr(self.config, "is_encoder_decoder", False) and isinstance(end, int):
            ids[:, -1] = end  # whose state is what a class is told from
        return ids

    def decoder_input_ids(self) -> torch.Tensor | None:
        if self.name.endswith("SequenceClassification"):
            return None
        bare = self.name.endswith(("Model", "QuestionAnswering"))
        if "labels" in self.parameters and not bare and not self.requires("decoder_input_ids"):
            return None
        return self.ids(SIZE, self.length // 2)

    def pixel_values(self) -> torch.Tensor | None:
        if self.lacks("vision_config"):
            return None
        if self.takes_flat_patches():
            return self.flat_patches()
        if "spatial_shapes" in self.parameters:
            return self.flat_patches().reshape(SIZE, GRID * GRID, -1)
        shape = self.image_shape()
        if "Video" in self.name and self.main() == "pixel_values":
            return self.randn(SIZE, self.number("num_frames", "frames_per_clip", default=4), *shape)
        if self.model_type in _MANY_IMAGES:
            return self.randn(SIZE, _MANY_IMAGES[self.model_type], *shape)
        return self.randn(SIZE, *shape)

    def flat_patches(self) -> torch.Tensor:
        patch = self.layer("", nn.Conv3d) or self.layer("patch", nn.Conv2d, nn.Linear)
        count = SIZE * GRID * GRID
        if patch is None:
            return self.randn(count, 3 * self.number("patch_size", default=14) ** 2)
        if isinstance(patch, nn.Linear):
            return self.randn(count, patch.in_features)
        return self.randn(count, patch.in_channels * math.prod(patch.kernel_size))

    def patches_of_vision(self) -> torch.Tensor | None:
        return self.flat_patches() if self.takes_flat_patches() else None

    def grid(self) -> torch.Tensor:
        return torch.tensor([[1, GRID, GRID]] * SIZE)

    def grid_without_time(self) -> torch.Tensor:
        return self.grid()[:, 1:]

    def videos(self) -> torch.Tensor | None:
        if not self.requires("pixel_values_videos") and self.main() != "pixel_values_videos":
            return None
        frames = self.number("num_frames", "frames_per_clip", default=4)
        return self.randn(SIZE, frames, *self.image_shape())

    def image_sizes(self) -> torch.Tensor | None:
        methods = methods_of(self.model, "get_image_features")
        if not methods or not method_requires(methods[-1], "image_sizes"):
            return None
        return torch.tensor([self.image_shape()[1:]] * SIZE)

    def spatial_shapes(self) -> torch.Tensor:
        return torch.tensor([[GRID, GRID]] * SIZE)

    def pixel_attention_mask(self) -> torch.Tensor | None:
        if "spatial_shapes" in self.parameters:
            return torch.ones(SIZE, GRID * GRID, dtype=torch.long)
        return None

    def input_features(self) -> torch.Tensor | None:
        """A spectrogram, its channels before or after time as the first layer wants them."""
        if "input_values" in self.parameters and not self.requires("input_features"):
            return None
        if self.lacks("audio_config"):
            return None
        audio = self.part("audio_config", "encoder_config", "audio_encoder", "speech_config")
        mels = self.mels()
        positions = first(audio, ("max_source_positions",))
        if self.mels_first:
            return self.randn(SIZE, mels, 2 * positions if positions else _FRAMES)
        return self.randn(SIZE, _FRAMES, mels)

    def input_values(self) -> torch.Tensor:
        if self.model_type.startswith(_CODECS):
            return self.randn(SIZE, 1, _SAMPLES)
        return self.randn(SIZE, _SAMPLES)

    def bbox(self) -> torch.Tensor:
        corners = torch.randint(0, 100, (SIZE, self.length, 2), generator=self.generator)
        return torch.cat([corners, corners + 20], dim=-1)

    def encoder_hidden_states(self) -> torch.Tensor | None:
        if "query_embeds" not in self.parameters:
            return None
        return self.randn(SIZE, 8, self.number("encoder_hidden_size", "hidden_size", default=64))

    def query_embeds(self) -> torch.Tensor | None:
        if not self.requires("query_embeds"):
            return None
        return self.randn(SIZE, 8, self.number("hidden_size", default=64))

    def inputs_embeds(self) -> torch.Tensor | None:
        if not self.requires("inputs_embeds") and self.main() != "inputs_embeds":
            return None
        return self.randn(SIZE, self.length, self.number("hidden_size", default=64))

    # -- media in the text -----------------------------------------------------------------------

    def _add_placeholders(self, arguments: Arguments) -> None:
        """Puts image and audio tokens into the text, as many as there are features."""
        if arguments.get("input_ids") is None or arguments["input_ids"].dim() != 2:
            return
        for medium, sources, token_names in _MEDIA:
            token = self.token(token_names)
            if token is None or all(arguments.get(s) is None for s in sources):
                continue
            ids = arguments["input_ids"]
            count = self._feature_count(medium, arguments) // len(ids)
            row = torch.full((len(ids), count), token)
            arguments["input_ids"] = torch.cat([ids[:, :4], row, ids[:, 4:]], dim=1)

    def _feature_count(self, medium: str, arguments: Arguments) -> int:
        """How many tokens an image or a sound becomes, which the model itself knows best."""
        methods = methods_of(self.model, f"get_{medium}_features")
        if not methods:
            return SIZE  # one for each example
        known = {name for method in methods for name in inspect.signature(method).parameters}
        given = {k: v for k, v in arguments.items() if k in known and v is not None}
        if "input_ids" in given and not method_requires(methods[-1], "input_ids"):
            del given["input_ids"]
        for mask, source in _MASKS:
            if mask in known and arguments.get(source) is not None and mask not in given:
                given[mask] = self._time_mask(arguments[source])
        with torch.no_grad(), torch.random.fork_rng():
            features = methods[0](**given)
        if not isinstance(features, (torch.Tensor, list, tuple)):
            pooled = getattr(features, "pooler_output", None)
            features = features.last_hidden_state if pooled is None else pooled
        return sum(f.numel() // f.shape[-1] for f in tensors(features))

    def _add_masks(self, arguments: Arguments) -> None:
        for mask, source in _MASKS:
            if mask in self.parameters and mask not in arguments:
                if arguments.get(source) is not None:
                    arguments[mask] = self._time_mask(arguments[source])
        if (ids := arguments.get("input_ids")) is None:
            sound = arguments.get("input_features")
            if sound is not None and not self.mels_first and "attention_mask" in self.parameters:
                arguments.setdefault("attention_mask", self._time_mask(sound))
            return
        if "attention_mask" in self.parameters and "attention_mask" not in arguments:
            arguments["attention_mask"] = torch.ones_like(ids)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self.parameters and name not in arguments:
                arguments[name] = self._token_types(ids)

    def _time_mask(self, source: torch.Tensor) -> torch.Tensor:
        """All frames of a sound count."""
        length = source.shape[1 if source.dim() == 3 and not self.mels_first else -1]
        return torch.ones(source.shape[0], length, dtype=torch.long)

    def _token_types(self, ids: torch.Tensor) -> torch.Tensor:
        types = torch.zeros_like(ids)
        for number, (_, _, names) in enumerate(_MEDIA, 1):
            if (token := self.token(names)) is not None:
                types[ids == token] = number
        return types


def _choose(arguments: Arguments) -> None:
    """Two choices for each example."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            arguments[name] = torch.stack([value, value], dim=1)


_MEDIA = (
    ("image", ("pixel_values",), ("image_token_id", "image_token_index")),
    ("video", ("pixel_values_videos",), ("video_token_id", "video_token_index")),
    ("audio", ("input_features", "input_values"), ("audio_token_id", "audio_token_index")),
)
_MASKS = (
    ("feature_attention_mask", "input_features"),
    ("input_features_mask", "input_features"),
    ("input_values_mask", "input_values"),
    ("padding_mask", "input_features"),
    ("audio_mel_mask", "audio_mel"),
    ("padding_mask", "input_values"),
)
# Model types that take several pictures for each text, and how many.
_MANY_IMAGES = {
    "idefics": 1,
    "idefics2": 1,
    "idefics3": 1,
    "smolvlm": 1,
    "modernvbert": 1,
    "colmodernvbert": 1,
    "ultravbert": 1,
    "llava_next": 2,
    "llava_next_video": 2,
    "llava_onevision": 2,
    "granite4_vision": 2,
    "lightglue": 2,
    "superglue": 2,
    "efficientloftr": 2,
    "xclip": 4,
    "vivit": 4,
    "timesformer": 4,
}
# Model types, by how they begin, whose sound has a dimension of channels.
_CODECS = (
    "encodec",
    "mimi",
    "dac",
    "pe_audio",
    "pocket_tts",
    "vibevoice",
    "xcodec",
    "neucodec",
    "higgs_audio",
    "gradium",
)
_MAKERS: dict[str, Callable[[Maker], Any]] = {
    "pixel_values": Maker.pixel_values,
    "pixel_values_videos": Maker.videos,
    "image_grid_thw": Maker.grid,
    "grid_thw": Maker.grid,
    "image_grid_hw": Maker.grid_without_time,
    "hidden_states": Maker.patches_of_vision,
    "image_sizes": Maker.image_sizes,
    "spatial_shapes": Maker.spatial_shapes,
    "pixel_attention_mask": Maker.pixel_attention_mask,
    "input_features": Maker.input_features,
    "input_values": Maker.input_values,
    "input_ids": Maker.input_ids,
    "inputs_embeds": Maker.inputs_embeds,
    "bbox": Maker.bbox,
    "encoder_hidden_states": Maker.encoder_hidden_states,
    "query_embeds": Maker.query_embeds,
    "decoder_input_ids": Maker.decoder_input_ids,
}
