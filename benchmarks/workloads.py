"""The models that are measured, built from their configs with random weights.

``tiny`` is for tests, ``small`` for a CPU of two cores, ``large`` for a GPU, where there are two
models more, and ``launch`` is GPT-2 on so little that a GPU waits for the host. Nothing is
downloaded. Depends on torch and transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

MODELS = ("gpt2", "bert", "llama", "vit", "t5")
GPU_MODELS = ("gpt2", "bert", "llama", "llama_8", "vit", "t5", "qwen3_moe")
ATTENTIONS = ("sdpa", "eager")
DROPOUT = 0.1

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Workload:
    """Names a model and how it is trained; :func:`make` builds it."""

    model: str
    attention: str = "sdpa"
    dropout: float = DROPOUT
    size: str = "small"
    dtype: str = "float32"
    device: str = "cpu"
    optimizer: str | None = None
    autocast: str | None = None
    accumulate: bool = False
    """Whether a step adds to the gradients of one before it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a model and its batch are. ``length`` counts tokens; an image's is its side."""

    batch: int
    length: int
    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int = 4096
    experts: int = 0


SHAPES = {
    "tiny": {
        "gpt2": Shape(2, 32, 64, 4, 4, 256, 512),
        "bert": Shape(2, 32, 64, 4, 4, 256, 512),
        "llama": Shape(2, 32, 64, 4, 4, 256, 512),
        "vit": Shape(2, 64, 64, 4, 4, 256),
        "t5": Shape(2, 32, 64, 2, 4, 256, 512),
        "llama_8": Shape(2, 32, 64, 8, 4, 256, 512),
        "qwen3_moe": Shape(2, 32, 64, 2, 4, 64, 512, experts=8),
    },
    "small": {
        "gpt2": Shape(2, 256, 256, 12, 4, 1024),
        "bert": Shape(4, 128, 256, 12, 4, 1024),
        "llama": Shape(2, 256, 256, 16, 8, 688),
        "vit": Shape(4, 176, 256, 12, 4, 1024),
        "t5": Shape(2, 256, 256, 6, 4, 1024),
    },
    # GPT-2 medium, BERT large, layers of Llama 3 8B, ViT large, T5 large, layers of Qwen3 30B-A3B.
    "large": {
        "gpt2": Shape(8, 1024, 1024, 24, 16, 4096, 50257),
        "bert": Shape(16, 512, 1024, 24, 16, 4096, 30522),
        "llama": Shape(2, 2048, 4096, 4, 32, 14336, 128256),
        "vit": Shape(64, 224, 1024, 24, 16, 4096),
        "t5": Shape(8, 512, 1024, 24, 16, 4096, 32128),
        "llama_8": Shape(2, 2048, 4096, 8, 32, 14336, 128256),
        "qwen3_moe": Shape(2, 2048, 2048, 4, 32, 768, 151936, experts=128),
    },
    "launch": {"gpt2": Shape(1, 128, 768, 12, 12, 3072, 50257)},
}


def make(workload: Workload) -> tuple[nn.Module, Batch]:
    """The model in training mode and its batch, both on the workload's device."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    shape = SHAPES[workload.size][workload.model]
    auto, config, batch = _MAKERS[workload.model](shape, workload.dropout)
    dtype = getattr(torch, workload.dtype)
    torch.manual_seed(0)
    with torch.device(workload.device):
        model = auto.from_config(config, attn_implementation=workload.attention, dtype=dtype)
    return model.train(), {name: _placed(t, workload.device, dtype) for name, t in batch.items()}


def _placed(tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _ids(shape: Shape, length: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1234)
    size = (shape.batch, length or shape.length)
    return torch.randint(5, shape.vocabulary, size, generator=generator)


def _gpt2(shape: Shape, dropout: float) -> tuple[Any, Any, Batch]:
    config = transformers.AutoConfig.for_model(
        "gpt2",
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.feed_forward,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = _ids(shape)
    return transformers.AutoModelForCausalLM, config, {"input_ids": ids, "labels": ids.clone()}


def _bert(shape: Shape, dropout: float) -> tuple[Any, Any, Batch]:
    config = transformers.AutoConfig.for_model(
        "bert",
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=shape.length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
    )
    mask = torch.ones(shape.batch, shape.length, dtype=torch.long)
    mask[:, shape.length * 25 // 32 :] = 0  # padded, so that attention gets a real mask
    batch = {
        "input_ids": _ids(shape),
        "attention_mask": mask,
        "labels": torch.arange(shape.batch) % 3,
    }
    return transformers.AutoModelForSequenceClassification, config, batch


def _llama(shape: Shape, dropout: float) -> tuple[Any, Any, Batch]:
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 4,
        max_position_embeddings=shape.length,
        attention_dropout=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = _ids(shape)
    return transformers.AutoModelForCausalLM, config, {"input_ids": ids, "labels": ids.clone()}


def _qwen3_moe(shape: Shape, dropout: float) -> tuple[Any, Any, Batch]:
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        moe_intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 4,
        head_dim=max(16, 128 * shape.width // 2048),
        num_experts=shape.experts,
        num_experts_per_tok=min(8, shape.experts // 2),
        max_position_embeddings=shape.length,
        attention_dropout=dropout,
        use_cache=False,
    )
    ids = _ids(shape)
    return transformers.AutoModelForCausalLM, config, {"input_ids": ids, "labels": ids.clone()}


def _vit(shape: Shape, dropout: float) -> tuple[Any, Any, Batch]:
    config = transformers.AutoConfig.for_model(
        "vit",
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        image_size=shape.length,
        patch_size=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=10,
    )
    generator = torch.Generator().manual_seed(1234)
    pixels = torch.randn(shape.batch, 3, shape.length, shape.length, generator=generator)
    batch = {"pixel_values": pixels, "labels": torch.arange(shape.batch) % 10}
    return transformers.AutoModelForImageClassification, config, batch


def _t5(shape: Shape, dropout: float) -> tuple[Any, Any, Batch]:
    config = transformers.AutoConfig.for_model(
        "t5",
        vocab_size=shape.vocabulary,
        d_model=shape.width,
        d_kv=shape.width // shape.heads,
        d_ff=shape.feed_forward,
        num_layers=shape.layers,
        num_decoder_layers=shape.layers,
        num_heads=shape.heads,
        dropout_rate=dropout,
        use_cache=False,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    batch = {"input_ids": _ids(shape), "labels": _ids(shape, shape.length // 2)}
    return transformers.AutoModelForSeq2SeqLM, config, batch


_MAKERS: dict[str, Callable[[Shape, float], tuple[Any, Any, Batch]]] = {
    "gpt2": _gpt2,
    "bert": _bert,
    "llama": _llama,
    "llama_8": _llama,
    "qwen3_moe": _qwen3_moe,
    "vit": _vit,
    "t5": _t5,
}
