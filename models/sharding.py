"""How InternVL's modules may be sharded: tables beside the models, which themselves know nothing of parallelism.

roots     the three modules, each gathered, laid out and timed on its own
blocks    what is gathered, freed and recomputed together
tensor    how tensor parallelism splits each layer (styles of ``parallel/tensor.py``)
pipeline  what the first and the last stage hold besides their layers

Paths are relative to the module's root; ``*`` stands for one path component.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ModelTables:
    """What the engine must know of a model to shard it.

    Attributes:
        roots: Module (``vit``, ``projector``, ``llm``) → path of its submodule; ``""`` is the whole model. A model
            without images has ``llm`` alone.
        blocks: Module → path pattern of its repeated blocks.
        tensor: Module → path pattern → style; what is not named is replicated.
        layers: Path of the LLM's list of layers.
        first: Paths that only the first pipeline stage holds.
        last: Paths that only the last one holds.
    """

    roots: Mapping[str, str]
    blocks: Mapping[str, str]
    tensor: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    layers: str = "model.layers"
    first: tuple[str, ...] = ("model.embed_tokens",)
    last: tuple[str, ...] = ("model.norm", "lm_head")

    def module_of(self, parameter: str) -> str:
        """Name the module that a parameter belongs to.

        Raises:
            KeyError: The parameter is in none of them.
        """
        for module, path in self.roots.items():
            if not path or parameter.startswith(path + "."):
                return module
        raise KeyError(f"parameter {parameter!r} is in none of {', '.join(self.roots.values())}")


INTERNVL = ModelTables(
    roots={"vit": "vision_model", "projector": "mlp1", "llm": "language_model"},
    blocks={"vit": "encoder.layers.*", "llm": "model.layers.*"},
    tensor={
        "vit": {
            "encoder.layers.*.attn.qkv": "colwise_copy",
            "encoder.layers.*.attn.q_norm": "width_norm",
            "encoder.layers.*.attn.k_norm": "width_norm",
            "encoder.layers.*.attn.proj": "rowwise_reduce",
            "encoder.layers.*.mlp.fc1": "colwise_copy",
            "encoder.layers.*.mlp.fc2": "rowwise_reduce",
        },
        "projector": {"1": "colwise_copy", "3": "rowwise_reduce"},
        "llm": {
            "model.embed_tokens": "embedding",
            "model.layers.*.input_layernorm": "norm_gather",
            "model.layers.*.self_attn.q_proj": "colwise",
            "model.layers.*.self_attn.k_proj": "colwise",
            "model.layers.*.self_attn.v_proj": "colwise",
            "model.layers.*.self_attn.o_proj": "rowwise_scatter",
            "model.layers.*.post_attention_layernorm": "norm_gather",
            "model.layers.*.mlp.gate_proj": "colwise",
            "model.layers.*.mlp.up_proj": "colwise",
            "model.layers.*.mlp.down_proj": "rowwise_scatter",
            "model.norm": "norm",
            "lm_head": "head",
        },
    },
)
"""Tables of :class:`evovlm.models.internvl.InternVL`."""


def module_of(parameter: str) -> str:
    """Name the module (``vit``, ``projector`` or ``llm``) that a parameter of InternVL belongs to.

    Raises:
        KeyError: The name is not one of an InternVL model.
    """
    return INTERNVL.module_of(parameter)
