"""Builds a model class and its batch. Depends on the other files of this package, torch and
transformers.
"""

import inspect
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.zoo import overrides
from benchmarks.zoo.batches import make_batch
from benchmarks.zoo.classes import ModelClass
from benchmarks.zoo.configs import small_config

_SEED = 0


class NotBuildable(Exception):
    """A class cannot be built here; the message is the reason."""


def build(model_class: ModelClass) -> tuple[nn.Module, dict[str, Any]]:
    """The model in training mode with random weights on the CPU, and the arguments of one step.

    The same at each call; seeds the global random number generator. Raises :class:`NotBuildable`.
    """
    for key in (model_class.class_name, model_class.model_type):
        if key in overrides.NOT_BUILDABLE:
            raise NotBuildable(f"{model_class.class_name}: {overrides.NOT_BUILDABLE[key]}")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.manual_seed(_SEED)
    try:
        cls = getattr(transformers, model_class.class_name, None)
        if cls is None:
            raise NotBuildable(f"{model_class.class_name}: transformers exports no such class")
        config = _config_for(cls, small_config(model_class.model_type))
        if cls.forward is nn.Module.forward:
            raise NotBuildable(f"{model_class.class_name}: has no forward, but parts that have one")
        if "inference_session" in inspect.signature(cls.forward).parameters:
            raise NotBuildable(f"{model_class.class_name}: follows a video, frame by frame")
        model: nn.Module = cls(config).float().train()
        batch = make_batch(model, model_class)
    except ImportError as error:
        raise NotBuildable(f"{model_class.class_name}: {_first_line(error)}") from error
    torch.manual_seed(_SEED)
    return model, batch


def _config_for(cls: Any, config: Any) -> Any:
    """The config itself, or the one that the class is made from, such as that of a decoder."""
    wanted = cls.config_class
    if wanted is not None and not isinstance(config, wanted):
        parts = [v for v in vars(config).values() if isinstance(v, wanted)]
        config = parts[0] if parts else small_config(wanted.model_type)
    for name, value in overrides.CLASSES.get(cls.__name__, {}).items():
        part, _, field = name.rpartition(".")
        setattr(getattr(config, part) if part else config, field, value)
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
