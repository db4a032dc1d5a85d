"""What a capture assumes of values that it cannot know, and what it refuses to."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from memfit.planner import InfeasibleBudget, plan
from memfit.planner.capture import ASSUMED_MARGIN, capture
from memfit.planner.errors import CaptureError

Forward = Callable[[torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """A layer and what is done with its result."""

    def __init__(self, then: Forward) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.linear(x)).sum()


def experts(x: torch.Tensor) -> torch.Tensor:
    chosen = x.topk(2).indices
    return torch.cat([x[(chosen == e).any(-1)] for e in range(8)])


def picked(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


def checked(x: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(x).all() or torch.isnan(x).any():
        raise ValueError("not finite")
    return x


def dropped(x: torch.Tensor) -> torch.Tensor:
    return x * 3 if torch.rand([]) < 0.1 else x * 2


def sorted_out(x: torch.Tensor) -> torch.Tensor:
    return x[x.long()[x[:, 0] > 0][:, 0]]  # whole numbers do not shape what they pick


def compared(x: torch.Tensor) -> torch.Tensor:
    return x if torch.equal(x, x.detach() + 1) else x * 2


def counted(x: torch.Tensor) -> torch.Tensor:
    assert x.max().isnan().sum() == 0
    return x


def by_numpy(x: torch.Tensor) -> torch.Tensor:
    return x[: 1 + int(x.detach().numpy().argmax())]


@pytest.mark.parametrize(
    ("then", "shape"),
    [
        (experts, "float32[2, 8]"),  # 8 rows, 2 of 8 experts each
        (picked, "float32[64]"),  # a mask may select everything
        (checked, "float32[8, 8]"),
        (by_numpy, "float32[1, 8]"),
        (compared, "float32[8, 8]"),
        (counted, "float32[8, 8]"),
        (sorted_out, "float32[8, 8]"),
    ],
)
def test_assumptions_are_noted_and_leave_a_margin(then: Forward, shape: str) -> None:
    step = capture(Model(then), (torch.ones(8, 8),))
    assert any(op.signature.endswith(f"({shape})") or shape in op.signature for op in step.ops)
    (note,) = step.notes
    assert note.startswith("the course of the model depends on activations")
    assert step.margin == ASSUMED_MARGIN


class Experts(nn.ModuleDict):
    """Layers that are found by the number that a router chose."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen: torch.Tensor = x[0].argmax()
        made: torch.Tensor = self[f"layer_{chosen}"](x)
        return made


def test_a_number_in_a_name_is_that_of_the_assumed_choice() -> None:
    experts = Experts({f"layer_{i}": nn.Linear(8, 4 + i) for i in range(8)})
    step = capture(Model(experts), (torch.ones(8, 8),))
    assert any("float32[8, 4]" in op.signature for op in step.ops)
    assert len(step.notes) == 1


def test_a_layer_is_assumed_not_to_be_dropped() -> None:
    step = capture(Model(dropped), (torch.ones(8, 8),))
    assert any("[8, 8], 2)" in op.signature for op in step.ops)
    assert len(step.notes) == 1


def test_values_that_are_known_need_no_assumption() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(8) % 2 == 0
        return x[mask] if mask.any() and mask.tolist()[0] else x

    step = capture(Model(masked), (torch.ones(8, 8),))
    assert step.notes == ()
    assert any(op.signature == "aten.sum.default(float32[4, 8])" for op in step.ops)


@pytest.mark.parametrize(
    "then",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.max().item(),
        lambda x: x * x[0].tolist()[0],
    ],
)
def test_other_values_are_refused(then: Forward) -> None:
    with pytest.raises(CaptureError, match="the model reads a value that depends on activations"):
        capture(Model(then), (torch.ones(8, 8),))


def test_the_margin_of_a_plan_is_left_free_and_part_of_the_smallest_budget() -> None:
    model, batch = Model(experts), (torch.ones(64, 8),)
    free = plan(model, "1GiB", batch).predicted
    margin = int(ASSUMED_MARGIN * (free.unplanned_peak_bytes - free.resident_bytes))
    with pytest.raises(InfeasibleBudget) as error:
        plan(model, free.peak_bytes + margin - 1, batch)
    assert error.value.minimum_bytes == free.peak_bytes + margin
    with pytest.raises(InfeasibleBudget) as error:
        plan(model, 1, batch)
    assert error.value.minimum_bytes == free.peak_bytes + margin
    tight = plan(model, free.peak_bytes + margin, batch)
    assert tight.budget_bytes == free.peak_bytes + margin
    assert tight.predicted.peak_bytes == free.peak_bytes
