"""InternLM2 and InternLM2.5, the language model of InternVL2.5-8B and VisualPRM-8B: other names, q, k, v in one tensor.

    evovlm                                   published
    model.embed_tokens, lm_head              model.tok_embeddings, output
    layers.3.self_attn.{q,k,v}_proj          layers.3.attention.wqkv       [K, A/K q | k | v, D] rows: by KV head
    layers.3.self_attn.o_proj                layers.3.attention.wo
    layers.3.mlp.{gate,up,down}_proj         layers.3.feed_forward.{w1,w3,w2}
    layers.3.{input,post_attention}_layernorm  layers.3.{attention,ffn}_norm

Everything else is a decoder without biases, which evovlm computes as the family ``internlm3``; it is read only, and an
export of it is a Llama to transformers.
"""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from evovlm.models.config import DecoderConfig
from evovlm.models.hf.names import EMBEDDING, LM_HEAD, Shapes

_PART = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.weight")
_FUSED = "qkv_proj.weight"
_NAMES = (
    (f".self_attn.{_FUSED}", ".attention.wqkv.weight"),
    (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
)
_ENDS = {EMBEDDING: "language_model.model.tok_embeddings.weight", LM_HEAD: "language_model.output.weight"}


def fused_shapes(shapes: Shapes) -> Shapes:
    """Put one ``qkv_proj`` in the place of each layer's q, k and v projections, as the files have it.

    Args:
        shapes: What the model has, by name inside evovlm; other tensors are kept.
    """
    fused: Shapes = {}
    for name, shape in shapes.items():
        match = _PART.fullmatch(name)
        key = match[1] + _FUSED if match else name
        fused[key] = (fused[key][0] + shape[0], *shape[1:]) if match and key in fused else shape
    return fused


def internlm2_names(name: str) -> tuple[str, ...]:
    """Translate a name of :func:`fused_shapes` to the one that its tensor has on disk."""
    if not name.startswith("language_model."):
        return (name,)
    if name in _ENDS:
        return (_ENDS[name],)
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return (name,)


def split_fused(tensors: Iterable[tuple[str, Tensor]], config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Split a stream's fused projections into q, k and v; other tensors pass.

    Args:
        tensors: Pairs of name and tensor; a fused one is ``[(A + 2·K)·D, H]``, its rows grouped by KV head: the
            group's queries, its key, its value.
        config: Shape of the decoder.
    """
    for name, tensor in tensors:
        if not name.endswith(_FUSED):
            yield name, tensor
            continue
        base = name.removesuffix(_FUSED)
        groups = tensor.view(config.num_kv_heads, -1, config.head_dim, tensor.shape[1])
        yield f"{base}q_proj.weight", groups[:, :-2].flatten(0, 2)
        yield f"{base}k_proj.weight", groups[:, -2].flatten(0, 1)
        yield f"{base}v_proj.weight", groups[:, -1].flatten(0, 1)
