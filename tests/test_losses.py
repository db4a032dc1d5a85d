"""What a training step differentiates: the model's loss, or what stands in for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from memfit.planner.capture import capture
from memfit.planner.errors import CaptureError
from memfit.planner.losses import loss_of


@dataclass
class Scored:
    scores: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


def test_a_scalar_that_trains_is_the_loss(make: Callable[..., Any]) -> None:
    model, batch = make("llama")
    outputs = model(**batch)
    for given in (outputs, {"loss": outputs.loss}, (outputs.loss, outputs.logits), outputs.loss):
        assert loss_of(given, model) == (outputs.loss, "")


def test_without_labels_the_means_of_the_outputs_are_planned_for(make: Callable[..., Any]) -> None:
    model, batch = make("llama")
    del batch["labels"]
    outputs = model(**batch, use_cache=False)
    loss, note = loss_of(outputs, model)
    assert torch.equal(loss, outputs.logits.mean())
    assert "returned no loss" in note and "(logits)" in note and "labels" in note
    assert capture(model, batch).notes == (note,)


def test_every_output_with_a_gradient_is_part_of_the_surrogate_once() -> None:
    model = nn.Linear(2, 2)
    a, b = model(torch.ones(3, 2)), model(torch.zeros(3, 2))
    loss, note = loss_of(Scored(a, (a, b)), model)
    assert torch.equal(loss, a.mean() + b.mean())
    assert "(scores, hidden)" in note


def test_outputs_that_no_gradient_flows_to_are_refused() -> None:
    with pytest.raises(CaptureError, match="Linear returned no loss"):
        loss_of(torch.ones(3), nn.Linear(2, 2))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(CaptureError, match="no parameter that trains"):
        loss_of(torch.ones(3), frozen)
