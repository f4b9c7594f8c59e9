"""Names and shapes of every weight, inside evovlm and in the two published formats (spec §1.5).

    evovlm = OpenGVLab (``internvl``)                transformers
    vision_model.encoder.layers.3.norm1.weight       vision_tower.encoder.layer.3.layernorm_before.weight
    vision_model.encoder.layers.3.attn.qkv.weight    …layer.3.attention.{q_proj, k_proj, v_proj}.weight, a third each
                                                     (rows in another order: see ``qkv.py``)
    mlp1.1.weight                                    multi_modal_projector.linear_1.weight
    language_model.model.norm.weight                 language_model.model.norm.weight

There is one map, from inside to outside. The way back is its inverse over the names that a configuration has.
"""

import re
from typing import Literal

from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig

Format = Literal["internvl", "transformers"]
"""``internvl``: OpenGVLab's ``InternVLChatModel``; ``transformers``: its port, ``InternVLForConditionalGeneration``."""

Shapes = dict[str, tuple[int, ...]]
"""Shape of every tensor by its name inside evovlm, in the order of the model's parameters."""

EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"

_PREFIXES = {
    "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
    "vision_model.embeddings.patch_embedding": "vision_tower.embeddings.patch_embeddings.projection",
    "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
    "mlp1.0": "multi_modal_projector.layer_norm",
    "mlp1.1": "multi_modal_projector.linear_1",
    "mlp1.3": "multi_modal_projector.linear_2",
}
_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(ls1|ls2|norm1|norm2|attn\.\w+|mlp\.fc[12])(?:\.(\w+))?")
_IN_LAYER = {
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_MODERN = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


def published_names(name: str, format: Format) -> tuple[str, ...]:
    """Translate one name to the names that its tensor has on disk.

    Args:
        name: A name inside evovlm, such as ``mlp1.0.weight``.
        format: Which published format.

    Returns:
        One name; or, for a fused q, k, v projection in ``transformers``, three, each a third of the rows of
        the published tensor (:mod:`evovlm.models.hf.qkv`) in order.

    Raises:
        KeyError: No published format has such a tensor.
    """
    if format == "internvl" or name.startswith("language_model."):
        return (name,)
    if match := _LAYER.fullmatch(name):
        layer, inner, leaf = match.groups()
        tail = f".{leaf}" if leaf else ""
        base = f"vision_tower.encoder.layer.{layer}."
        if inner == "attn.qkv":
            return tuple(f"{base}attention.{part}_proj{tail}" for part in "qkv")
        return (f"{base}{_IN_LAYER[inner]}{tail}",)
    for ours, theirs in _PREFIXES.items():
        if name == ours or name.startswith(f"{ours}."):
            return (theirs + name[len(ours) :],)
    raise KeyError(f"no published name for tensor {name!r}")


def canonical(name: str) -> str:
    """Bring the two spellings of ``transformers`` names to the one that its files have had from the start.

    A model in memory says ``model.language_model.norm.weight`` and ``lm_head.weight``; files say
    ``language_model.model.norm.weight`` and ``language_model.lm_head.weight``. Some tools save the former.
    """
    for modern, stored in _MODERN:
        if name.startswith(modern):
            return stored + name[len(modern) :]
    return name


def vision_shapes(config: VisionConfig) -> Shapes:
    """List the ViT's tensors, named as in the whole model (``vision_model.…``)."""
    width = config.hidden_size
    shapes: Shapes = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.position_embedding": (1, 1 + config.num_patches, width),
        "embeddings.patch_embedding.weight": (width, 3, config.patch_size, config.patch_size),
        "embeddings.patch_embedding.bias": (width,),
    }

    def norm(name: str) -> Shapes:
        parts = ("weight",) if config.norm == "rms_norm" else ("weight", "bias")
        return {f"{name}.{part}": (width,) for part in parts}

    for layer in range(config.num_layers):
        block: Shapes = {"ls1": (width,), "ls2": (width,), **norm("norm1")}
        block["attn.qkv.weight"] = (3 * width, width)
        if config.qkv_bias:
            block["attn.qkv.bias"] = (3 * width,)
        if config.qk_norm:
            block |= {"attn.q_norm.weight": (width,), "attn.k_norm.weight": (width,)}
        block |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,), **norm("norm2")}
        block |= {"mlp.fc1.weight": (config.ffn_size, width), "mlp.fc1.bias": (config.ffn_size,)}
        block |= {"mlp.fc2.weight": (width, config.ffn_size), "mlp.fc2.bias": (width,)}
        shapes |= {f"encoder.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def projector_shapes(config: InternVLConfig) -> Shapes:
    """List the projector's tensors (``mlp1.…``)."""
    merged, hidden = config.shuffled_size, config.decoder.hidden_size
    return {
        "mlp1.0.weight": (merged,),
        "mlp1.0.bias": (merged,),
        "mlp1.1.weight": (hidden, merged),
        "mlp1.1.bias": (hidden,),
        "mlp1.3.weight": (hidden, hidden),
        "mlp1.3.bias": (hidden,),
    }


def decoder_shapes(config: DecoderConfig) -> Shapes:
    """List the decoder's tensors, named as in the whole model (``language_model.…``); a tied head is not one."""
    hidden, ffn = config.hidden_size, config.ffn_size
    rows = {"q": config.num_heads * config.head_dim, "k": config.num_kv_heads * config.head_dim}
    rows["v"] = rows["k"]
    shapes: Shapes = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        block: Shapes = {"input_layernorm.weight": (hidden,)}
        for part, size in rows.items():
            block[f"self_attn.{part}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                block[f"self_attn.{part}_proj.bias"] = (size,)
        block["self_attn.o_proj.weight"] = (hidden, rows["q"])
        block["post_attention_layernorm.weight"] = (hidden,)
        block |= {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
        block["mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"language_model.model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["language_model.model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def model_shapes(config: InternVLConfig) -> Shapes:
    """List every tensor of a model: ViT, projector, decoder."""
    return {**vision_shapes(config.vision), **projector_shapes(config), **decoder_shapes(config.decoder)}
