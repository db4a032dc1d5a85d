"""Puts LoRA adapters on a model, as PEFT does. Depends on peft, an optional package, and torch."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from memfit.planner.errors import MemfitError, first_line

_ALL = "all-linear"
# Classes whose head starts from random weights, and so is trained whole.
_NEW_HEADS = ("Classification", "ForQuestionAnswering")


class AdapterError(MemfitError, ValueError):
    """Adapters that a model cannot have."""


def add_lora(model: nn.Module, rank: int, targets: Sequence[str] = ()) -> nn.Module:
    """``model`` with adapters of a rank, all else frozen but a head that is new for the task.

    ``targets`` are names of the modules that get one, or ``all-linear`` alone; none are PEFT's own
    choice for the model type. Raises :class:`AdapterError` where peft is missing or knows no place.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise AdapterError(
            f"--lora needs {error.name}, which is not installed: `pip install peft`"
        ) from error
    modules = _ALL if list(targets) == [_ALL] else list(targets) or None
    config = peft.LoraConfig(r=rank, target_modules=modules, modules_to_save=_new_head(model))
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with warnings.catch_warnings(), place:
            warnings.simplefilter("ignore")  # what peft settles by itself, such as Conv1D's layout
            adapted: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        raise AdapterError(
            f"{type(model).__name__} cannot have these adapters: {first_line(error)}; name modules "
            f"it has, as in --lora r={rank},targets=q_proj+v_proj, or targets={_ALL}"
        ) from error
    return adapted.train()


def _new_head(model: nn.Module) -> list[str] | None:
    """Names of what a task's class adds to the pretrained model."""
    if not type(model).__name__.endswith(_NEW_HEADS):
        return None
    pretrained = getattr(model, "base_model_prefix", "")
    named = ((name, child) for name, child in model.named_children() if name != pretrained)
    return [name for name, child in named if any(True for _ in child.parameters())]
