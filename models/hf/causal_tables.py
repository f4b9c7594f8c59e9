"""The engine's tables for a transformers model, made from the tensor-parallel plan that transformers ships with it.

    transformers' plan                             evovlm's styles (sequence parallel between blocks)
    layers.*.self_attn.q_proj   colwise            colwise          its input is gathered by the norm before it
    layers.*.self_attn.o_proj   rowwise            rowwise_scatter
    layers.*.self_attn.q_norm   replicated_…       local            whole parameters, this rank's heads
    embed_tokens                embedding_rowwise  embedding
    lm_head                     colwise_gather…    head
    (not in the plan)           input_layernorm    norm_gather      acts on this rank's rows, gives out all
    (not in the plan)           norm               norm

A style or a module that is not in this table is an error: it would be computed wrongly, not slowly.
"""

import re

from evovlm.models.hf.causal import HFDecoder
from evovlm.models.hf.read_config import ConfigError
from evovlm.models.sharding import ModelTables
from evovlm.parallel.requirements import LLMShape

LAYERS = "model.layers.*"
_STYLES = {"colwise": "colwise", "rowwise": "rowwise_scatter"}
_BY_NAME = {
    ("lm_head", "colwise_gather_output"): "head",
    ("lm_head", "colwise_rep"): "head",
    ("model.embed_tokens", "embedding_rowwise"): "embedding",
    (f"{LAYERS}.self_attn.q_norm", "replicated_with_grad_allreduce"): "local",
    (f"{LAYERS}.self_attn.k_norm", "replicated_with_grad_allreduce"): "local",
}
_NORMS = {
    f"{LAYERS}.input_layernorm": "norm_gather",
    f"{LAYERS}.post_attention_layernorm": "norm_gather",
    "model.norm": "norm",
}


def decoder_tables(decoder: HFDecoder) -> ModelTables:
    """Derive the tables of a model (see the head of this file).

    Args:
        decoder: The model; may be on the meta device.

    Returns:
        Tables of a model that has no module but ``llm``.

    Raises:
        ConfigError: The plan has a style, or the model a module with parameters, that this file does not know
            (mixtures of experts, norms after attention, …); the message names the first few.
    """
    name = decoder.name
    if not decoder.tp_plan:
        raise ConfigError(f"{name} has no tensor-parallel plan in transformers")
    tensor = dict(_NORMS)
    unknown = []
    for path, style in decoder.tp_plan.items():
        if style in _STYLES and path.startswith(f"{LAYERS}."):
            tensor[path] = _STYLES[style]
        elif (path, style) in _BY_NAME:
            tensor[path] = _BY_NAME[path, style]
        else:
            unknown.append(f"{path}: {style}")
    if unknown:
        raise ConfigError(f"{name}: no counterpart for {_some(unknown)} in transformers' tensor-parallel plan")
    # In order and once each: dict, not set.
    owners = dict.fromkeys(
        re.sub(r"^model\.layers\.\d+", LAYERS, path)
        for path, module in decoder.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    )
    if left := [path for path in owners if path not in tensor]:
        raise ConfigError(
            f"{name}: {_some(left)} hold parameters but are not in transformers' tensor-parallel plan, nor norms "
            f"before attention and MLP ({', '.join(_NORMS)})"
        )
    if idle := [path for path in _NORMS if path not in owners]:
        raise ConfigError(f"{name} has no {', '.join(idle)}: nothing would gather the rows that a colwise linear reads")
    return ModelTables(roots={"llm": ""}, blocks={"llm": LAYERS}, tensor={"llm": tensor})


def decoder_shape(decoder: HFDecoder, *, pack_tokens: int, packs_per_step: int) -> LLMShape:
    """Say what the axes of a layout must divide, for :func:`evovlm.parallel.validate.check_plan`.

    Args:
        decoder: The model; may be on the meta device.
        pack_tokens: T.
        packs_per_step: Packs of one optimizer step, over all ranks.
    """
    config = decoder.config
    return LLMShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        pack_tokens=pack_tokens,
        packs_per_step=packs_per_step,
    )


def _some(items: list[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
