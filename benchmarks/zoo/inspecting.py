"""Looks up what a model and its config, with all of its parts, tell about themselves.

Depends on torch.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch


def first(config: Any, names: tuple[str, ...]) -> Any:
    """The first of the attributes that is set."""
    for name in names:
        try:
            if (value := getattr(config, name, None)) is not None:
                return value
        except Exception:  # one that differs from layer to layer
            continue
    return None


def all_configs(config: Any) -> Iterator[Any]:
    """A config, its parts and their parts."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type"):
            yield from all_configs(value)


def special_ids(config: Any) -> set[int]:
    values = [v for n, v in vars(config).items() if n.endswith(("_token_id", "_token_index"))]
    return {v for v in values if isinstance(v, int)}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def has_token(config: Any, medium: str) -> bool:
    return first(config, (f"{medium}_token_id", f"{medium}_token_index")) is not None


def methods_of(model: Any, name: str) -> list[Any]:
    """The method of a model and that of the model inside, which it may hand everything to."""
    return [getattr(owner, name) for owner in model.modules() if hasattr(owner, name)][:2]


def method_requires(method: Any, name: str) -> bool:
    parameter = inspect.signature(method).parameters.get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty
