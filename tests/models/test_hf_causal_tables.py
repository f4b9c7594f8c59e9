"""What the engine is told of a transformers model, and what it refuses to be told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from evovlm.models.decoder import PackedAttend
from evovlm.models.hf import ConfigError
from evovlm.models.hf.causal import HFDecoder
from evovlm.models.hf.causal_tables import decoder_shape, decoder_tables
from evovlm.models.sharding import ModelTables
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.requirements import ModelShapes
from evovlm.parallel.validate import check_plan

from .hf_causal_support import KINDS, V, borders, make, wrap

LAYER = {
    "input_layernorm": "norm_gather",
    "post_attention_layernorm": "norm_gather",
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise_scatter",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise_scatter",
}
HEAD_NORMS = {"self_attn.q_norm": "local", "self_attn.k_norm": "local"}


@pytest.mark.parametrize("kind", KINDS)
def test_tables(kind: str) -> None:
    decoder = wrap(make(kind))
    tables = decoder_tables(decoder)
    layer = LAYER | (HEAD_NORMS if kind == "Qwen3" else {})
    root = {"model.norm": "norm", "model.embed_tokens": "embedding", "lm_head": "head"}
    tensor = root | {f"model.layers.*.{name}": style for name, style in layer.items()}
    assert tables == ModelTables(roots={"llm": ""}, blocks={"llm": "model.layers.*"}, tensor={"llm": tensor})
    assert {tables.module_of(name) for name, _ in decoder.named_parameters()} == {"llm"}


def test_a_plan_can_be_checked() -> None:
    shapes = ModelShapes(llm=decoder_shape(wrap(make("Qwen3")), pack_tokens=32, packs_per_step=4))
    check_plan(ParallelPlan.for_llm(Layout(tp=2, hp=2, pp=2)), shapes, 8)
    with pytest.raises(ValueError, match=r"K = 2 KV heads cannot be split over tp = 4"):
        check_plan(ParallelPlan.for_llm(Layout(tp=4)), shapes, 4)


def experts(lm: Any) -> None:
    lm.tp_plan["model.layers.*.mlp.experts"] = "moe_tp_experts"


def extra_norm(lm: Any) -> None:
    lm.model.layers[2].pre_feedforward_layernorm = nn.LayerNorm(24)


def no_norm(lm: Any) -> None:
    for layer in lm.model.layers:
        layer.input_layernorm = nn.Identity()


def no_plan(lm: Any) -> None:
    lm._tp_plan = {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (experts, r"model\.layers\.\*\.mlp\.experts: moe_tp_experts"),
        (extra_norm, r"model\.layers\.\*\.pre_feedforward_layernorm hold parameters"),
        (no_norm, r"has no model\.layers\.\*\.input_layernorm"),
        (no_plan, "no tensor-parallel plan"),
    ],
)
def test_models_that_the_tables_do_not_cover(change: Callable[[Any], None], message: str) -> None:
    lm = make("Llama")
    change(lm)
    with pytest.raises(ConfigError, match=message):
        decoder_tables(HFDecoder(lm))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "Qwen3Moe",
            {"num_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1},
            r"Qwen3MoeForCausalLM: no counterpart for \S*mlp\.experts\.gate_up_proj: packed_colwise",
        ),
        ("Olmo2", {}, r"Olmo2ForCausalLM: no counterpart for \S*self_attn\.q_proj: colwise_gather_output"),
        ("Gemma2", {}, r"Gemma2ForCausalLM has final_logit_softcapping = 30\.0"),
    ],
)
def test_other_models_of_transformers(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decoder_tables(HFDecoder(make(kind, **options)))


# What the protocol cannot keep ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Llama", {"attention_dropout": 0.1}, "LlamaAttention asks for dropout = 0.1"),
        (
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
            "Qwen3Attention asks for sliding_window = 4",
        ),
    ],
)
def test_other_attention_is_an_error(kind: str, options: dict[str, Any], message: str) -> None:
    decoder = HFDecoder(make(kind, **options)).train()
    with pytest.raises(ConfigError, match=message):
        decoder(torch.arange(3), torch.arange(3.0), PackedAttend(borders([3])))


def test_models_of_another_make_are_errors() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigError, match="rope_type = 'dynamic': its frequencies depend"):
        HFDecoder(make("Llama", rope_parameters=rope))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no model\.embed_tokens"):
        HFDecoder(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)))
    with pytest.raises(ConfigError, match="PhiForCausalLM has"):
        HFDecoder(make("Phi"))
    lm = make("Llama")
    lm.lm_head = nn.Linear(24, V)
    with pytest.raises(ConfigError, match="bias in its output head"):
        HFDecoder(lm)
