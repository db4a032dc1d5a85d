"""What people do by hand when memory runs out: the ways that memfit is timed against.

``hf_K`` is transformers' checkpointing of every K-th block, ``hf_1_offload`` that of every block
with what is kept copied to the host, which takes a GPU. ``keep_attention`` and
``every_second_matmul`` recompute every block but for chosen ops, by torch's selective checkpointing
(torchtitan's rule for the second); with dropout on its gradients may be wrong, which is no matter
here, where only time and memory count. ``compile_S`` is torch.compile, told to save the share S of
the activations. Depends on torch and, for its switches, on transformers' models.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from benchmarks.training import checkpoint_layers, checkpointing, keep_layers

_aten = torch.ops.aten
_BATCHED = frozenset({_aten.bmm.default, _aten.baddbmm.default})
_MATMULS = frozenset({_aten.mm.default, _aten.addmm.default}) | _BATCHED
_ATTENTION = frozenset(
    getattr(_aten, f"_scaled_dot_product_{kernel}").default
    for kernel in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
)


_compiled_shares: list[float] = []


def _nothing_missing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Rival:
    """One way to train with less memory, which can be switched on and off."""

    name: str
    on: Callable[[nn.Module], None]
    off: Callable[[nn.Module], None] = keep_layers
    missing: Callable[[], str] = _nothing_missing
    """Why it cannot be had on this machine; empty if it can."""

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Trains the model this way."""
        self.on(model)
        try:
            yield
        finally:
            self.off(model)


def _every_n(n: int) -> Rival:
    return Rival(f"hf_{n}", partial(checkpoint_layers, every_n_layers=n))


def _keep_attention(_: SelectiveCheckpointContext, op: Any, *__: Any, **___: Any) -> bool:
    """Attention without a kernel of its own is made of batched products, and blocks have no other.

    True stands for MUST_SAVE, False for PREFER_RECOMPUTE.
    """
    return op in _ATTENTION or op in _BATCHED


class _EverySecondMatmul:
    """Saves attention and the first, third, ... matrix product of a block."""

    def __init__(self) -> None:
        self._products: Counter[bool] = Counter()

    def __call__(
        self, context: SelectiveCheckpointContext, op: Any, *_: Any, **__: Any
    ) -> CheckpointPolicy:
        save = op in _ATTENTION
        if op in _MATMULS:
            self._products[context.is_recompute] += 1
            save = self._products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def _selective(name: str, new_policy: Callable[[], Callable[..., Any]]) -> Rival:
    """Every block checkpointed, each time by a new policy."""

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(new_policy())  # type: ignore[no-untyped-call]

    return Rival(name, partial(checkpoint_layers, context_fn=contexts))


def _missing_offload() -> str:
    if not torch.cuda.is_available():
        return "activations are offloaded from a GPU"
    model = transformers.PreTrainedModel
    if "offload" in inspect.signature(checkpointing(model, "enable")).parameters:
        return ""
    return f"transformers {transformers.__version__} does not offload activations"


def _compiled(share: float) -> Rival:
    """Told to save the share of the activations."""
    return Rival(f"compile_{share:g}", partial(_compile, share), _uncompile, _missing_compiler)


def _compile(share: float, model: nn.Module) -> None:
    # What is compiled already is taken again whatever the share is, and is to be, for its own.
    if _compiled_shares != [share]:
        torch.compiler.reset()
        _compiled_shares[:] = [share]
    _set_activation_budget(share)
    model.compile()


def _uncompile(model: nn.Module) -> None:
    _set_activation_budget(1.0)
    model._compiled_call_impl = None


def _set_activation_budget(share: float) -> None:
    from torch._functorch import config

    config.activation_memory_budget = share


def _missing_compiler() -> str:
    """Compiles something small; the end of the error where that fails."""
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f"torch.compile does not work: {str(error).strip().splitlines()[0]}"
    return ""


RIVALS = {
    rival.name: rival
    for rival in (
        *(_every_n(n) for n in (1, 2, 3, 4)),
        _selective("keep_attention", lambda: _keep_attention),
        _selective("every_second_matmul", _EverySecondMatmul),
        Rival("hf_1_offload", partial(checkpoint_layers, offload=True), missing=_missing_offload),
        *(_compiled(share) for share in (0.3, 0.5, 0.7)),
    )
}
