"""Frozen dataclasses to JSON values and back; reading checks every key and type.

A trailing underscore of a field, which keeps a Python keyword apart, is not in its JSON key.
Depends on nothing but the standard library.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A file or a JSON value is not the record that it should be; the text names the place."""


def encode(value: Any) -> Any:
    """``value``, a record or anything that holds records, as what ``json`` writes."""
    if dataclasses.is_dataclass(value):
        return {
            f.name.rstrip("_"): encode(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, where: str = "$") -> Any:
    """Inverse of :func:`encode` for a ``value`` that is to be a ``kind``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, value, where)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is not ... and len(arguments) == len(value):
            pairs = enumerate(zip(arguments, value, strict=True))
            return tuple(decode(k, v, f"{where}[{i}]") for i, (k, v) in pairs)
        if arguments[-1] is ...:
            return tuple(decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: decode(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is types.UnionType:
        return None if value is None else decode(arguments[0], value, where)
    if origin is typing.Literal and value in arguments:
        return value
    if kind is float and type(value) is int and abs(value) < 10**300:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    shown = "a very long number" if _is_long(value) else json.dumps(value)[:60]
    raise RecordError(f"{where} is {shown}, expected {_name(kind)}")


def _is_long(value: Any) -> bool:
    """Whether Python refuses to write a number out."""
    return type(value) is int and abs(value) >= 10**300


def read(path: str | Path) -> str:
    """The text of a file; :class:`RecordError` with the reason where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecordError(f"cannot read {path}: {reason}") from error


def write(path: str | Path, text: str) -> None:
    """Writes a file; one that is there is replaced in one step."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def _decode_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{where} is not an object")
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        key = field.name.rstrip("_")
        if key in value:
            found[field.name] = decode(hints[field.name], value[key], f"{where}.{key}")
        elif field.default is dataclasses.MISSING:
            raise RecordError(f"{where}.{key} is missing")
    return kind(**found)


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return getattr(kind, "__name__", str(kind))
