"""Memory budgets as people write them, and bytes as people read them.

A budget is an ``int`` of bytes or a string with a unit: ``GiB`` is 2**30 bytes, ``GB`` is 10**9.
What could mean either is refused, because the two differ by 7 %. Depends on the errors only.
"""

import re
from decimal import Decimal
from numbers import Integral

from memfit.planner.errors import MemfitError

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL_UNITS = ("B", "KB", "MB", "GB", "TB")
_BYTES_OF_UNIT = {
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)},
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)},
    "": 1,
}
_AMOUNT_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_WAY_OUT = (
    'Give bytes as an int, or a string such as "24GiB" (2**30 bytes each) or "24GB" (10**9); '
    'where a GPU is present, "auto" means what it has free.'
)


class BudgetError(MemfitError, ValueError):
    """A budget is not an amount of memory."""


def parse_budget(value: int | str) -> int:
    """Bytes of a budget such as ``25769803776``, ``"24GiB"``, ``"24 GB"`` or ``"1.5TiB"``."""
    if isinstance(value, str):
        budget_bytes = _parse_text(value)
    # bool is an int in Python; a budget of True is a mistake, not one byte. NumPy's integers are
    # integers that are not ints.
    elif isinstance(value, Integral) and not isinstance(value, bool):
        budget_bytes = int(value)
    else:
        raise _refusal(value, f"it is a {type(value).__name__}, not an int or a string")
    if budget_bytes <= 0:
        raise _refusal(value, "it is less than one byte")
    return budget_bytes


def format_bytes(count: int) -> str:
    """``count`` in binary units with three significant digits, such as ``1.23 GiB``."""
    if abs(count) < 1024:
        return f"{count} B"
    power = 1
    # 999.5 and more would round to four digits, so the next unit takes them.
    while abs(count) >= 999.5 * 1024**power and power < len(_BINARY_UNITS) - 1:
        power += 1
    digits = f"{count / 1024**power:#.3g}".rstrip(".")
    return f"{digits} {_BINARY_UNITS[power]}"


def exact_bytes(count: int) -> str:
    """The same with the number itself: ``1.23 GiB (1320702444 bytes)``."""
    return f"{format_bytes(count)} ({count} bytes)"


def _parse_text(text: str) -> int:
    match = _AMOUNT_AND_UNIT.fullmatch(text)
    if match is None:
        raise _refusal(text, "it is not a positive number followed by a unit")
    amount, unit = match.groups()
    if unit.lower() not in _BYTES_OF_UNIT:
        raise _refusal(text, _what_is_wrong_with(unit))
    # Decimal is exact where float is not; a fraction of a byte is no memory, so it is dropped.
    return int(Decimal(amount) * _BYTES_OF_UNIT[unit.lower()])


def _what_is_wrong_with(unit: str) -> str:
    prefix = unit[0].upper()
    if unit.upper() in (prefix, f"{prefix}I") and prefix in "KMGT":
        return f'"{unit}" may mean {prefix}iB or {prefix}B: write one of them'
    return f'"{unit}" is not a unit of memory'


def _refusal(value: object, why: str) -> BudgetError:
    return BudgetError(f"{value!r} is not a memory budget: {why}. {_WAY_OUT}")
