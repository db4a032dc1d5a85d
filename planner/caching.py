"""Key/value caches are for generation: a training step that recomputes would write them twice.

transformers switches them off under its own activation checkpointing; a captured step and a planned
model do the same, by the same hook, so that what is planned is what runs. Depends on torch alone.
"""

import inspect
from typing import Any

import torch
from torch import nn


def caching_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of ``model`` with a config and a ``use_cache`` argument."""
    found: list[nn.Module] = []
    pending = [model]
    while pending:
        module = pending.pop()
        parameters = inspect.signature(type(module).forward).parameters
        if "use_cache" in parameters and hasattr(module, "config"):
            found.append(module)
        else:
            pending.extend(module.children())
    return found


def without_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook (with keyword arguments): no cache while gradients are recorded."""
    if not torch.is_grad_enabled() or kwargs.get("use_cache") is False:
        return None
    return args, kwargs | {"use_cache": False}


def cache_note(model: nn.Module) -> str:
    """Says that a model trains without the cache that it is configured to fill, if it is."""
    if not any(getattr(m.config, "use_cache", False) for m in caching_modules(model)):
        return ""
    return (
        "key/value caches are off while gradients are recorded; the gradients are those of "
        "use_cache=False"
    )


def is_cache(value: object) -> bool:
    """Whether an argument is a key/value cache of transformers, by what it offers."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")
