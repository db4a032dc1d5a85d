"""The bytes and seconds of a choice, counted by hand."""

import pytest

from memfit.solvers import (
    Moment,
    Option,
    Problem,
    Region,
    SharedTensor,
    Status,
    loads,
    peak_bytes,
    recompute_seconds,
)
from memfit.solvers.problem import describe, seconds_ceiling

KEEP = Option("keep", stored_bytes=10, forward_bytes=12, backward_bytes=20, recompute_seconds=0.0)
CHECKPOINT = Option("checkpoint", 1, 11, 22, 0.5)
PROBLEM = Problem(
    regions=tuple(Region(f"layers.{r}", (KEEP, CHECKPOINT), kind=0) for r in range(3)),
    moments=(
        Moment("forward of layers.1", 100, stored=1, region=1),
        Moment("loss", 105, stored=3),
        Moment("backward of layers.2", 101, stored=2, region=2, phase="backward"),
        Moment("optimizer step", 120, stored=0),
    ),
    budget_bytes=140,
)


def test_loads_are_the_base_the_stored_bytes_before_and_the_region_at_work() -> None:
    assert loads(PROBLEM, (0, 1, 0)) == (100 + 10 + 11, 105 + 21, 101 + 11 + 20, 120)
    assert loads(PROBLEM, (1, 1, 1)) == (100 + 1 + 11, 105 + 3, 101 + 2 + 22, 120)
    assert peak_bytes(PROBLEM, (0, 1, 0)) == 132
    assert recompute_seconds(PROBLEM, (1, 1, 0)) == 1.0


def test_a_shared_tensor_counts_once_and_only_while_a_chosen_holder_is_at_work_or_before() -> None:
    tensor = SharedTensor("residual", 1000, holders=((0, 0), (1, 0), (2, 1)), moments=(0, 1, 2))
    problem = Problem(PROBLEM.regions, PROBLEM.moments, 0, shared=(tensor,))

    def extra(*choices: int) -> list[int]:
        pairs = zip(loads(problem, choices), loads(PROBLEM, choices), strict=True)
        return [shared - alone for shared, alone in pairs]

    assert extra(0, 0, 1) == [1000, 1000, 1000, 0]
    assert extra(1, 0, 0) == [1000, 1000, 1000, 0]  # at work in the forward of layers.1
    assert extra(1, 1, 1) == [0, 1000, 1000, 0]  # held from layers.2 on
    assert extra(1, 1, 0) == [0, 0, 0, 0]


def test_a_problem_without_moments_peaks_at_nothing() -> None:
    assert peak_bytes(Problem(PROBLEM.regions, (), 0), (0, 0, 0)) == 0


def test_a_choice_must_name_an_option_for_every_region() -> None:
    with pytest.raises(ValueError, match="shorter"):
        loads(PROBLEM, (0, 0))


def test_describe_clamps_the_bound_and_states_the_gap() -> None:
    solution = describe(PROBLEM, (1, 1, 0), Status.FEASIBLE, "ilp", bound_seconds=0.75)
    assert (solution.recompute_seconds, solution.bound_seconds, solution.gap) == (1.0, 0.75, 0.25)
    assert solution.peak_bytes == 101 + 2 + 20
    assert describe(PROBLEM, (1, 1, 0), Status.OPTIMAL, "ilp", bound_seconds=2.0).gap == 0.0
    assert describe(PROBLEM, (1, 1, 0), Status.OPTIMAL, "ilp", bound_seconds=-1.0).gap == 1.0
    assert describe(PROBLEM, (0, 0, 0), Status.OPTIMAL, "ilp", bound_seconds=-1.0).gap == 0.0


def test_sums_in_another_order_are_the_same_seconds() -> None:
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert 0.1 + 0.2 + 0.3 <= seconds_ceiling(0.3 + 0.2 + 0.1)
    assert seconds_ceiling(1.0) < 1.0001


@pytest.mark.parametrize("status", Status)
def test_every_status_says_what_to_do(status: Status) -> None:
    assert status.remedy
