"""The scalar that a training step differentiates, found in what a model returned.

Depends on torch alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from memfit.planner.errors import CaptureError

# In the note on a model that returns none.
NO_LOSS = "returned no loss"


def loss_of(outputs: Any, model: nn.Module) -> tuple[torch.Tensor, str]:
    """The loss in a model's outputs, and a note for people where a surrogate stands in for it.

    The loss is ``.loss``, ``["loss"]``, the first item, or the output itself, if that is a scalar
    with a gradient. A model that returns none, since its batch has no labels or its class no head,
    is planned for the sum of the means of all that it returns.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise CaptureError(
            f"{type(model).__name__} has no parameter that trains; set requires_grad on what should"
        )
    loss = _named_loss(outputs)
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss, ""
    return _surrogate(outputs, model)


def _named_loss(outputs: Any) -> Any:
    if hasattr(outputs, "loss"):
        return outputs.loss
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, (tuple, list)) and outputs:
        return outputs[0]
    return outputs


def _surrogate(outputs: Any, model: nn.Module) -> tuple[torch.Tensor, str]:
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in _named_tensors(outputs):
        if tensor.is_floating_point() and tensor.requires_grad:
            found.setdefault(id(tensor), (name, tensor))
    if not found:
        raise CaptureError(
            f"{type(model).__name__} returned no loss to train on and nothing that a gradient flows"
            " to; give the batch its labels"
        )
    means = [t.mean() for _, t in found.values()]
    names = ", ".join(dict.fromkeys(name or "its output" for name, _ in found.values()))
    return sum(means[1:], start=means[0]), (
        f"{type(model).__name__} {NO_LOSS}: planned for the sum of the means of what it "
        f"returned ({names}); give the batch labels, or expect your own loss to differ"
    )


def _named_tensors(outputs: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in outputs, each under the name of the field that it lies in."""
    if isinstance(outputs, torch.Tensor):
        yield name, outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _named_tensors(value, name or str(key))
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from _named_tensors(value, name)
    elif dataclasses.is_dataclass(outputs):
        for field in dataclasses.fields(outputs):
            yield from _named_tensors(getattr(outputs, field.name), name or field.name)
