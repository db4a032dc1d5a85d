"""Notices activation checkpointing that is at work in a model already, memfit's own or another's.

A step that recomputes cannot be captured as the step without a plan, and a plan on top of it would
recompute twice. Modules of transformers say so by an attribute; a model that is planned
has a hook with a marker.
Depends on torch.
"""

from torch import nn

# Set on the hook that memfit puts on a planned model.
PLANNED_MARKER = "_memfit_planned"
# The way out, for messages.
SWITCH_OFF = (
    "call model.activation_checkpointing_disable() (or leave activation_checkpointing=False; "
    "use_gradient_checkpointing=False in PEFT's prepare_model_for_kbit_training)"
)


def checkpointed_module(model: nn.Module) -> str | None:
    """FQN of a module in which checkpointing is switched on (the type for the model itself)."""
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            return name or type(module).__name__
    return None


def is_planned(model: nn.Module) -> bool:
    """Whether a memfit plan is applied to the model."""
    return any(hasattr(h, PLANNED_MARKER) for h in model._forward_pre_hooks.values())
