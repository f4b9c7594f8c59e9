"""Small random causal language models of transformers, and wrapped copies of them."""

from typing import Any

import torch
import transformers
from torch import Tensor

from evovlm.models.hf.causal import HFDecoder

KINDS = ("Llama", "Qwen3")
V = 53


def make(kind: str, seed: int = 0, attention: str | None = "eager", **options: Any) -> Any:
    """A small random model of transformers in which every parameter matters."""
    shape = {
        "vocab_size": V,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = getattr(transformers, f"{kind}Config")(**{**shape, **options}, attn_implementation=attention)
    lm = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.2 * noise)
    return lm


def wrap(lm: Any) -> HFDecoder:
    """A wrapped copy: wrapping takes a model over, and the original stays the reference."""
    twin = type(lm)(type(lm.config).from_dict(lm.config.to_dict()))
    twin.load_state_dict(lm.state_dict())
    return HFDecoder(twin.to(lm.dtype)).eval()


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
