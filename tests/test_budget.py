"""Budgets are read exactly or refused with a way out."""

from typing import Any

import pytest

from memfit.planner.budget import BudgetError, format_bytes, parse_budget


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1, 1),
        (25_769_803_776, 25_769_803_776),
        ("1000000", 1_000_000),
        ("17B", 17),
        ("2KB", 2_000),
        ("2KiB", 2_048),
        ("512MiB", 512 * 2**20),
        ("512 mb", 512 * 10**6),
        ("24GiB", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("80gb", 80 * 10**9),
        ("  24gib ", 24 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("1TB", 10**12),
        ("0.1GB", 10**8),
        ("1.9B", 1),
    ],
)
def test_reads(written: int | str, expected: int) -> None:
    assert parse_budget(written) == expected


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("12 potatoes", '"potatoes" is not a unit'),
        ("", "not a positive number"),
        ("GiB", "not a positive number"),
        ("-24GiB", "not a positive number"),
        ("nan", "not a positive number"),
        ("1e9", "not a positive number"),
        ("1_000", "not a positive number"),
        ("24GiB 3MiB", "not a positive number"),
        ("auto", "not a positive number"),
        ("٢٤GiB", "not a positive number"),
        ("24G", "GiB or GB"),
        ("24gi", "GiB or GB"),
        ("512m", "MiB or MB"),
        ("24i", '"i" is not a unit'),
        ("0GiB", "less than one byte"),
        ("0.5B", "less than one byte"),
        (0, "less than one byte"),
        (-1, "less than one byte"),
        (True, "it is a bool"),
        (24e9, "it is a float"),
        (float("nan"), "it is a float"),
        (None, "it is a NoneType"),
    ],
)
def test_refuses_with_value_cause_and_way_out(written: Any, why: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(written)
    message = str(caught.value)
    assert message.startswith(repr(written))
    assert why in message
    assert '"24GiB"' in message
    assert '"auto"' in message


def test_a_refused_budget_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a memory budget"):
        parse_budget("a lot")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (512 * 2**20, "512 MiB"),
        (1023 * 2**20, "0.999 GiB"),
        (round(1.234 * 2**30), "1.23 GiB"),
        (round(9.996 * 2**30), "10.0 GiB"),
        (24 * 2**30, "24.0 GiB"),
        (80 * 10**9, "74.5 GiB"),
        (5 * 2**40, "5.00 TiB"),
        (-3 * 2**20, "-3.00 MiB"),
    ],
)
def test_formats(count: int, expected: str) -> None:
    assert format_bytes(count) == expected
