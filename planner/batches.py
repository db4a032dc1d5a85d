"""Makes the arguments of one training step, labels included, out of a model's config.

A plan needs to know what a model is called with; a person mostly knows two numbers, how many
examples and how long. Token ids and class numbers are real tensors, since their values decide what
eager execution does (a mask of ones is dropped); pictures and sound are on ``meta``, since theirs
do not. Depends on torch, the plan document and the errors. Models are known by their class names,
their ``config``, ``main_input_name`` and ``forward`` signature alone: this file imports no
transformers.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memfit.planner.document import TensorSpec
from memfit.planner.errors import MemfitError

Arguments = dict[str, torch.Tensor]

# Lengths where the caller names none; a model with fewer positions gets all that it has.
_GENERATIVE_LENGTH = 2048
_OTHER_LENGTH = 512
_WAVEFORM_LENGTH = 160_000  # 10 seconds at 16 kHz
_IMAGE_SIZE = 224

_CLASSIFICATION = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
)
_QUESTION_ANSWERING = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
_GENERATIVE = ("ForCausalLM", "LMHeadModel")
_TOKEN_TASKS = (*_GENERATIVE, "ForMaskedLM")
_SEQ2SEQ = ("ForConditionalGeneration", "MTModel", "ForSpeechSeq2Seq")
_POSITIONS = (
    "max_encoder_position_embeddings",
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
)
_TARGET_POSITIONS = (
    "max_decoder_position_embeddings",
    "max_target_positions",
    "max_position_embeddings",
)


class BatchError(MemfitError, ValueError):
    """No batch of the kind that was asked for can be made for a model."""


@dataclass(frozen=True, slots=True)
class Batch:
    """How much a model is trained on in one step.

    ``length`` counts tokens; for speech-to-text models those of the transcript, for models of raw
    sound its samples. Left out it is what the model can take, at most 2048 tokens for causal
    language models, 512 tokens for others and 10 seconds of sound.
    """

    size: int = 1
    length: int | None = None

    def __post_init__(self) -> None:
        _check_positive("size", self.size)
        if self.length is not None:
            _check_positive("length", self.length)


def make_batch(model: nn.Module, batch: Batch | None = None) -> tuple[Arguments, str]:
    """The arguments of one training step of ``model``, and one line on what was assumed.

    Raises :class:`BatchError` where the class of the model, its config or its number of positions
    does not allow for it.
    """
    maker = _Maker(_unwrapped(model), batch or Batch())
    arguments, description = maker.make()
    maker.check_accepts(arguments)
    return arguments, description


def most_tokens(model: nn.Module) -> int | None:
    """Positions that a model of text has; None where its config names no limit."""
    return _Maker(_unwrapped(model), Batch())._positions()


def remake_batch(
    model: nn.Module, specs: Mapping[str, TensorSpec]
) -> tuple[Arguments | tuple[torch.Tensor, ...], str]:
    """Arguments of the shapes and dtypes that a plan states, and one line on what is not known.

    A tensor has the values that :func:`make_batch` gives one of its name, shape and dtype, if it
    makes one; a mask leaves the last position out, since one that leaves out nothing is not used;
    others are on ``meta``. Arguments without names are a tuple.
    """
    shapes = [spec.shape for spec in specs.values() if spec.shape]
    lengths = [None, *(shape[1] for shape in shapes if len(shape) == 2)]
    made: Arguments = {}
    for size, length in dict.fromkeys((shape[0], length) for shape in shapes for length in lengths):
        with suppress(BatchError):  # of another kind than made ones
            arguments, _ = make_batch(model, Batch(size, length))
            alike = {n: t for n, t in arguments.items() if specs.get(n) == _spec(t)}
            made = max(made, alike, key=len)
    unknown = {name: _unknown(name, spec) for name, spec in specs.items() if name not in made}
    tensors = {name: (made | unknown)[name] for name in specs}
    note = f"values of {', '.join(unknown)} are not in the plan" if unknown else ""
    if all(name.isdecimal() for name in tensors):
        return tuple(tensors.values()), note
    return tensors, note


def _unknown(name: str, spec: TensorSpec) -> torch.Tensor:
    """A tensor of which a plan says everything but the values."""
    dtype = getattr(torch, spec.dtype)
    if not name.endswith("mask") or dtype.is_floating_point or not spec.shape:
        return torch.empty(spec.shape, dtype=dtype, device="meta")
    mask = torch.ones(spec.shape, dtype=dtype)
    mask[..., -1] = 0
    return mask


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _check_positive(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BatchError(f"the {field} of a batch is a whole number from 1 up, not {value!r}")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of adapters, whose class says what it is trained for."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _positive(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of the attributes that is set; XLNet says -1 for no limit."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


class _Maker:
    """One model and the batch asked for."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model = model
        self.batch = batch
        self.type_name = type(model).__name__
        config = getattr(model, "config", None)
        if config is None:
            raise BatchError(
                f"{self.type_name} has no config to make a batch from; pass batch= with the "
                "arguments of one training step, labels included"
            )
        self.config: Any = config
        text = getattr(config, "get_text_config", None)
        self.text: Any = text() if callable(text) else config
        self.parameters = inspect.signature(model.forward).parameters
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = next(dtypes, torch.float32)

    def make(self) -> tuple[Arguments, str]:
        main_input = str(getattr(self.model, "main_input_name", "input_ids"))
        makers: dict[str, Callable[[], tuple[Arguments, str]]] = {
            "input_ids": self._text,
            "pixel_values": self._images,
            "input_features": self._sound,
            "input_values": self._sound,
        }
        if main_input not in makers:
            raise self._unknown_class()
        arguments, description = makers[main_input]()
        return arguments, f"batch of {description}"

    def check_accepts(self, arguments: Arguments) -> None:
        """Adds a mask where the model must have one; what else it must have is an error."""
        if not arguments.keys() <= self.parameters.keys():  # another task of the same name
            raise self._unknown_class()
        if "attention_mask" not in arguments and self._requires("attention_mask"):
            if "input_ids" in arguments:
                arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        missing = [n for n in self.parameters if n not in arguments and self._requires(n)]
        if missing:
            raise BatchError(
                f"{self.type_name} also needs {', '.join(missing)}, which no config tells; pass "
                "batch= with the arguments of one training step, labels included"
            )

    def _requires(self, name: str) -> bool:
        parameter = self.parameters.get(name)
        return (
            parameter is not None
            and parameter.default is inspect.Parameter.empty
            and parameter.kind
            not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        )

    def _unknown_class(self) -> BatchError:
        return BatchError(
            f"memfit cannot tell what {self.type_name} is trained on; pass batch= with the "
            "arguments of one training step, labels included"
        )

    # -- text ------------------------------------------------------------------------------------

    def _text(self) -> tuple[Arguments, str]:
        size, length = self.batch.size, self._text_length()
        arguments = {"input_ids": self._ids(length)}
        labels, said = self._text_labels(arguments["input_ids"], length)
        source = type(self.config).__name__
        return arguments | labels, f"{size} x {length} tokens made from {source}; {said}"

    def _text_labels(self, ids: torch.Tensor, length: int) -> tuple[Arguments, str]:
        if self.type_name.endswith(_TOKEN_TASKS):
            return {"labels": ids.clone()}, "labels = input_ids"
        if self._is_seq2seq():
            target = min(length, self._target_positions() or length)
            return {"labels": self._ids(target)}, f"labels of {self.batch.size} x {target} tokens"
        if self.type_name.endswith("ForTokenClassification"):
            classes = torch.arange(ids.numel()).reshape(ids.shape) % self._class_count()
            return {"labels": classes}, "labels = a class for each token"
        if self.type_name.endswith(_QUESTION_ANSWERING):
            starts = torch.zeros(self.batch.size, dtype=torch.int64)
            spans = {"start_positions": starts, "end_positions": starts + length - 1}
            return spans, "labels = start and end positions"
        return self._classes()

    def _text_length(self) -> int:
        limit = self._positions()
        generative = self.type_name.endswith(_GENERATIVE)
        default = _GENERATIVE_LENGTH if generative else _OTHER_LENGTH
        return self._within(limit, default, "positions")

    def _within(self, limit: int | None, default: int, noun: str) -> int:
        """The length asked for, held against the limit, or the default cut to it."""
        length = self.batch.length
        if length is None:
            return min(default, limit or default)
        if limit is not None and length > limit:
            raise BatchError(
                f"a length of {length} is more than the {limit} {noun} of {self.type_name}; use "
                f"at most {limit}, or a config with more"
            )
        return length

    def _positions(self) -> int | None:
        """RoBERTa and its kin count positions from behind the padding token's."""
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                if module.padding_idx is not None:
                    return module.num_embeddings - module.padding_idx - 1
        return _positive(self.text, _POSITIONS)

    def _target_positions(self) -> int | None:
        return _positive(self.text, _TARGET_POSITIONS) or _positive(self.config, _TARGET_POSITIONS)

    def _ids(self, length: int) -> torch.Tensor:
        """Ordinary tokens: padding and other special ones change what a model does.

        Encoder-decoder models get the end-of-sequence token that they are trained with.
        """
        vocabulary = _positive(self.text, ("vocab_size", "src_vocab_size"))
        if vocabulary is None:
            raise BatchError(
                f"the config of {self.type_name} names no vocab_size; pass batch= with the "
                "arguments of one training step, labels included"
            )
        special = self._special_ids()
        ordinary = [i for i in range(min(vocabulary, 4096)) if i not in special] or [0]
        count = self.batch.size * length
        ids = torch.tensor(ordinary)[torch.arange(count) % len(ordinary)]
        ids = ids.reshape(self.batch.size, length)
        end = getattr(self.text, "eos_token_id", None)
        if getattr(self.config, "is_encoder_decoder", False) and isinstance(end, int):
            ids[:, -1] = end
        return ids

    def _special_ids(self) -> set[int]:
        special: set[int] = set()
        for config in (self.config, self.text):
            for name in dir(config):
                if name.endswith(("_token_id", "_token_index")):
                    value = getattr(config, name)
                    special.update(value if isinstance(value, (list, tuple)) else [value])
        return special

    # -- classes ---------------------------------------------------------------------------------

    def _classes(self) -> tuple[Arguments, str]:
        if not self.type_name.endswith(_CLASSIFICATION):
            raise self._unknown_class()
        size, count = self.batch.size, self._class_count()
        problem = getattr(self.config, "problem_type", None)
        if problem == "multi_label_classification":
            flags = torch.empty(size, count, dtype=self.dtype, device="meta")
            return {"labels": flags}, f"labels = {count} flags each"
        if problem == "regression" or (problem is None and count == 1):
            shape = (size,) if count == 1 else (size, count)
            return {"labels": torch.empty(shape, dtype=self.dtype, device="meta")}, (
                "labels = numbers to regress to"
            )
        return {"labels": torch.arange(size) % count}, f"labels = one of {count} classes each"

    def _class_count(self) -> int:
        return _positive(self.config, ("num_labels",)) or 1

    def _is_seq2seq(self) -> bool:
        encodes = bool(getattr(self.config, "is_encoder_decoder", False))
        return encodes and self.type_name.endswith(_SEQ2SEQ)

    # -- pictures and sound ----------------------------------------------------------------------

    def _images(self) -> tuple[Arguments, str]:
        if self.batch.length is not None:
            raise BatchError(
                f"{self.type_name} takes pictures, which have no length: leave out the length "
                f"of {self.batch.length}; image_size in the config says how large they are"
            )
        labels, said = self._classes()
        vision = getattr(self.config, "vision_config", None) or self.config
        channels = _positive(vision, ("num_channels", "in_channels", "in_chans")) or 3
        shape = (self.batch.size, channels, *_image_shape(vision))
        pixels = torch.empty(shape, dtype=self.dtype, device="meta")
        source = type(self.config).__name__
        if not hasattr(vision, "image_size"):
            source = f"{source}, which names no image_size"
        return {
            "pixel_values": pixels
        } | labels, f"{_product(shape)} pixels made from {source}; {said}"

    def _sound(self) -> tuple[Arguments, str]:
        labels, said = self._sound_labels()
        name = str(self.model.main_input_name)
        shape = (self.batch.size, *self._sound_shape(takes_length=not self._is_seq2seq()))
        sound = torch.empty(shape, dtype=self.dtype, device="meta")
        unit = "samples of sound" if len(shape) == 2 else "features of sound"
        source = type(self.config).__name__
        return {name: sound} | labels, f"{_product(shape)} {unit} made from {source}; {said}"

    def _sound_labels(self) -> tuple[Arguments, str]:
        if not self._is_seq2seq():
            return self._classes()
        length = self._within(self._target_positions(), _OTHER_LENGTH, "decoder positions")
        return {"labels": self._ids(length)}, f"labels of {self.batch.size} x {length} tokens"

    def _sound_shape(self, takes_length: bool) -> tuple[int, ...]:
        """What one recording looks like; how long it is only for models that take any length."""
        config = self.config
        mels = _positive(config, ("num_mel_bins",))
        source = _positive(config, ("max_source_positions",))
        if mels is None or (source is None and _positive(config, ("max_length",)) is None):
            if (bins := _positive(config, ("input_feat_per_channel",))) and source:
                return (source, bins)
            if self.model.main_input_name == "input_features":  # of a kind not known here
                raise self._unknown_class()
            samples = self.batch.length if takes_length else None
            return (samples or _WAVEFORM_LENGTH,)
        if takes_length and self.batch.length is not None:
            raise BatchError(
                f"{self.type_name} takes spectrograms of a fixed length: leave out the length of "
                f"{self.batch.length}"
            )
        if source is not None:
            return (mels, 2 * source)  # the convolutions of Whisper halve the length
        return (int(config.max_length), mels)


def _image_shape(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or _IMAGE_SIZE
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _product(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
