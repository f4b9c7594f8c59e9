"""A tiny directory laid out as VisualPRM-8B is published: InternVL2.5's chat model around InternLM2.5."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evovlm.models.config import DecoderConfig, InternVLConfig
from evovlm.models.hf.names import model_shapes
from evovlm.models.hf.write_config import write_model

from .hf_support import as_published, random_weights

_LAYER_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def internlm2(config: InternVLConfig, vocab_size: int) -> InternVLConfig:
    """The same model around a decoder without biases, four queries to a key, narrower than its heads together."""
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=config.decoder.hidden_size,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=4,
        ffn_size=20,
        qkv_bias=False,
        norm_eps=1e-5,
        family="internlm3",
    )
    return replace(config, decoder=decoder)


def fuse(q: Tensor, k: Tensor, v: Tensor, config: DecoderConfig) -> Tensor:
    """Stack rows head by head: of each key's group the queries, the key, the value."""
    dim, group = config.head_dim, config.num_heads // config.num_kv_heads
    heads = []
    for head in range(config.num_kv_heads):
        heads += [q[(head * group + i) * dim : (head * group + i + 1) * dim] for i in range(group)]
        heads += [k[head * dim : (head + 1) * dim], v[head * dim : (head + 1) * dim]]
    return torch.cat(heads)


def published(weights: dict[str, Tensor], config: InternVLConfig) -> dict[str, Tensor]:
    """Our weights under the published names."""
    out = {}
    for name, tensor in as_published(weights, config.vision.num_heads).items():
        if name.endswith("q_proj.weight"):
            base = name.removesuffix("q_proj.weight")
            parts = (weights[f"{base}{part}_proj.weight"] for part in "qkv")
            out[base.replace("self_attn.", "attention.wqkv.weight")] = fuse(*parts, config.decoder)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for ours, theirs in _LAYER_NAMES.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            name = name.replace("model.embed_tokens", "model.tok_embeddings").replace("model.lm_head", "model.output")
            out[name] = tensor
    return out


def config_json(config: InternVLConfig, **changes: object) -> dict[str, Any]:
    """``config.json`` as published: the chat model's with another architecture."""
    written = write_model(config, "internvl", dtype=torch.float32, image_token=7, eos=2, bos=1)
    llm = written["llm_config"]
    del llm["qkv_bias"]
    llm |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    llm["rope_scaling"] = {"factor": 2.0, "type": "dynamic"}
    auto = {"AutoModel": "modeling_internvl_chat.InternVLRewardModel"}
    return written | {"architectures": ["InternVLRewardModel"], "auto_map": auto, "template": "internvl2_5"} | changes


def write_reward_model(directory: Path, config: InternVLConfig, seed: int = 0, **changes: object) -> dict[str, Tensor]:
    """Write configuration and weights; returns the weights by their names inside evovlm."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = random_weights(model_shapes(config), seed)
    (directory / "config.json").write_text(json.dumps(config_json(config, **changes)))
    save_file(published(weights, config), directory / "model.safetensors", metadata={"format": "pt"})
    return weights
