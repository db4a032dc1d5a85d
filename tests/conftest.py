"""Small models that the tests share, as factories."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

Made = tuple[Any, dict[str, torch.Tensor]]
MODELS = ("bert", "gpt2", "llama", "vit", "t5")

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _ids(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 90 + 5


def _bert(p: float, layers: int) -> Made:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
    )  # fmt: skip
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[:, 12:] = 0
    batch = {"input_ids": _ids(2, 16), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    return transformers.BertForSequenceClassification(config), batch


def _gpt2(p: float, layers: int) -> Made:
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=layers, n_head=2, n_positions=32,
        resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), {"input_ids": _ids(2, 16), "labels": _ids(2, 16)}


def _llama(p: float, layers: int) -> Made:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, attention_dropout=p,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": _ids(2, 16), "labels": _ids(2, 16)}


def _vit(p: float, layers: int) -> Made:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
    )  # fmt: skip
    batch = {"pixel_values": torch.ones(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    return transformers.ViTForImageClassification(config), batch


def _t5(p: float, layers: int) -> Made:
    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=layers, num_heads=2,
        dropout_rate=p,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    batch = {"input_ids": _ids(2, 16), "labels": _ids(2, 8)}
    return transformers.T5ForConditionalGeneration(config), batch


_MAKERS = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "vit": _vit, "t5": _t5}


@pytest.fixture
def make() -> Callable[..., Made]:
    """``make(name, dropout=0.1, layers=4, attention="sdpa")`` -> a model in train mode, a batch."""

    def factory(name: str, dropout: float = 0.1, layers: int = 4, attention: str = "sdpa") -> Made:
        torch.manual_seed(0)
        model, batch = _MAKERS[name](dropout, layers)
        model.set_attn_implementation(attention)
        return model.train(), batch

    return factory


@pytest.fixture
def gradients() -> Callable[..., dict[str, torch.Tensor]]:
    """``gradients(model, batch)`` -> loss and gradients of one step from a fixed seed."""

    def run(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = model(**batch).loss
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return found | {"loss": loss.detach()}

    return run
