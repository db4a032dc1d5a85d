"""Tells whether a plan belongs to a model: its parameters, what trains, and its config.

A fingerprint has one hash for each of the three, so that a mismatch can say what differs. It does
not depend on values, device or location, so a model on ``meta`` and the same model with weights
agree. Depends on torch.
"""

import hashlib
import json
import sys
from typing import Any

from torch import nn

# Keys of a transformers config that do not change what a training step computes, or that models set
# themselves at their first forward (problem_type).
_VOLATILE = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "problem_type",
        "transformers_version",
        "use_cache",
    }
)
_PARTS = {
    "class": "another class",
    "parameters": "other parameter names, shapes or dtypes",
    "training": "other trainable parameters (requires_grad)",
    "config": "another config (dropout, attention implementation, ...)",
}


def fingerprint(model: nn.Module) -> str:
    """Hashes of class, parameters, trainable set and config, as ``class:..-parameters:..``."""
    named = list(model.named_parameters(remove_duplicate=False))
    parts = {
        "class": unsharded_class(model).__qualname__,
        "parameters": [(n, list(p.shape), str(p.dtype)) for n, p in named],
        "training": [n for n, p in named if p.requires_grad],
        "config": _config(model),
    }
    return "-".join(f"{name}:{_hash(value)}" for name, value in parts.items())


def differences(expected: str, found: str) -> list[str]:
    """What tells two fingerprints apart, in words."""
    a, b = (
        dict(p.split(":", 1) for p in text.split("-") if ":" in p) for text in (expected, found)
    )
    return [words for name, words in _PARTS.items() if a.get(name) != b.get(name)]


def unsharded_class(model: nn.Module) -> type:
    """The class of a model; ``fully_shard`` makes an FSDPModule of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = getattr(fsdp, "FSDPModule", ())
    return next(c for c in type(model).__mro__ if not issubclass(c, sharded))


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    plain = {
        k: v for k, v in config.to_dict().items() if k not in _VOLATILE and "token_id" not in k
    }
    plain["attention"] = getattr(config, "_attn_implementation", None)
    return plain
