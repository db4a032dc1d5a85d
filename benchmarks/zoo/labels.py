"""Makes what a model is to learn: classes, tokens, boxes, masks. Depends on torch and, to know
whether boxes can be matched, on transformers.
"""

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.import_utils import is_scipy_available

if TYPE_CHECKING:
    from benchmarks.zoo.batches import Arguments, Maker

_CLASSES = re.compile(
    r".*For(Sequence|Image|Audio|Video|Speech)Classification\w*|.*ForXVector|.*ForNextSentencePrediction"
)
# Classes that take labels only to say that they cannot be trained with any.
_REFUSES = re.compile(
    r"[Tt]raining[^\n]{0,40} not (yet )?(implemented|supported)|not trainable|not support training"
)


def labels_of(maker: "Maker", arguments: "Arguments") -> "Arguments":
    """The arguments that tell a model what to learn, for those that its forward takes."""
    known = maker.parameters.keys()
    if _REFUSES.search(inspect.getsource(type(maker.model).forward)):
        return {}
    if "start_positions" in known:
        starts = torch.zeros(2, dtype=torch.long)
        return {"start_positions": starts, "end_positions": starts + 3}
    if {"mask_labels", "class_labels"} <= known:
        return _masks(arguments)
    pictures = known.isdisjoint(("input_ids", "decoder_input_ids"))
    if maker.name.endswith("MaskedImageModeling") and "bool_masked_pos" in known:
        return {"bool_masked_pos": _hidden_patches(maker)}
    named = "labels" in known or maker.name.endswith("ForSequenceClassification")
    if not named or (pictures and maker.name.endswith("Model")):
        return {"return_loss": True} if "return_loss" in known else {}
    labels = _labels(maker, arguments)
    found: dict[str, Any] = {} if labels is None else {"labels": labels}
    for name in ("next_sentence_label", "sentence_order_label"):
        if name in known:
            found[name] = torch.tensor([0, 1])
    return found


def _labels(maker: "Maker", arguments: "Arguments") -> Any:
    name, count = maker.name, maker.number("num_labels", default=2)
    if name.endswith(("ObjectDetection", "ForSegmentation", "InstanceSegmentation")):
        return _boxes(maker, arguments)
    if _CLASSES.fullmatch(name):
        return torch.arange(2) % count
    if name == "ViltForQuestionAnswering":  # how right each answer is
        return torch.full((2, count), 0.5)
    if name.endswith("ForMultipleChoice"):
        return torch.zeros(2, dtype=torch.long)
    if name.endswith("ForTokenClassification"):
        return maker.ids(*arguments["input_ids"].shape, vocabulary=count) % count
    if name.endswith("ForAudioFrameClassification"):
        return _frames(maker, arguments, count)
    if name.endswith(("ForCTC", "ForRNNT", "ForTDT")):
        return maker.ids(2, 4, vocabulary=20)
    if name.endswith("ForSemanticSegmentation"):
        shape = arguments["pixel_values"].shape
        return torch.arange(2 * shape[-1] * shape[-2]).reshape(2, *shape[-2:]) % count
    if name.endswith("ForDepthEstimation"):
        return maker.randn(2, *arguments["pixel_values"].shape[-2:]).abs() + 0.1
    return _tokens(maker, arguments)


def _tokens(maker: "Maker", arguments: "Arguments") -> Any:
    ids = arguments.get("input_ids")
    if getattr(maker.config, "is_encoder_decoder", False) or ids is None:
        return maker.ids(2, 12)
    special = torch.tensor(sorted(maker.special))
    return ids.masked_fill(torch.isin(ids, special) | (ids >= 200), -100)  # such as pictures


def _hidden_patches(maker: "Maker") -> torch.Tensor:
    """Every other patch of a picture."""
    _, height, width = maker.image_shape()
    patch = maker.number("patch_size", default=16)
    count = (height // patch) * (width // patch)
    return (torch.arange(count) % 2 == 0).repeat(2, 1)


def _frames(maker: "Maker", arguments: "Arguments", count: int) -> torch.Tensor:
    """A class for each frame, as flags."""
    samples = next(arguments[n] for n in ("input_values", "input_features") if n in arguments)
    frames = samples.shape[1]
    if hasattr(maker.model, "_get_feat_extract_output_lengths"):
        frames = int(maker.model._get_feat_extract_output_lengths(frames))
    return torch.nn.functional.one_hot(torch.arange(2 * frames).reshape(2, frames) % count, count)


def _boxes(maker: "Maker", arguments: "Arguments") -> Any:
    if not is_scipy_available():  # the matching of boxes needs it
        return None
    side = arguments["pixel_values"].shape[-1]
    label: dict[str, torch.Tensor] = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]]),
    }
    if maker.name.endswith("Segmentation"):
        label["masks"] = torch.ones(2, side, side)
    return [label] * 2


def _masks(arguments: "Arguments") -> "Arguments":
    if not is_scipy_available():
        return {}
    pictures = next(arguments[n] for n in ("pixel_values", "pixel_values_videos") if n in arguments)
    masks = torch.zeros(2, *pictures.shape[-2:])
    masks[0, :16], masks[1, 16:] = 1, 1
    return {"mask_labels": [masks] * 2, "class_labels": [torch.tensor([0, 1])] * 2}
