"""A causal language model of transformers, as it is, where evovlm's own decoder would stand.

    token ids [t] ─ embed_tokens ─► [t, H] ─ visual rows written over ─► as a batch of one ─► transformers' layers
                                                                           │ each calls the attention "evovlm",
    head(hidden, lm_head.weight) ◄─ [t, H] ◄─ norm ◄───────────────────────┘ which calls ``attend(layer, q, k, v)``

Nothing of the model is patched: its attention is replaced through transformers' registry, and the ``attend`` object
travels with the call, as a keyword of the forward pass. Its parameters keep the names that its checkpoints use, and
its tables for sharding and tensor parallelism are read off the plan that transformers ships with it
(:mod:`evovlm.models.hf.causal_tables`).
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface

from evovlm.csrc.ops import scatter_rows, scatter_rows_
from evovlm.models.decoder import Attend, Head
from evovlm.models.hf.names import LM_HEAD
from evovlm.models.hf.read_config import ConfigError
from evovlm.models.hf.save import DEFAULT_SHARD_BYTES
from evovlm.models.hf.shards import CheckpointError, Shards, ShardWriter, read_shards

ATTENTION = "evovlm"
"""Name of the attention in transformers' registry. No mask goes with it: none is ever built."""

_WITHOUT_EFFECT = ("position_ids", "use_cache", "is_causal")
_MULTIPLIERS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier")


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001 - transformers' signature
    *,
    attend: Attend,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: q ``[1, A, t, D]``, k and v ``[1, K, t, D]`` to ``[1, t, A, D]``."""
    asked = {name: option for name, option in options.items() if option is not None and name not in _WITHOUT_EFFECT}
    if dropout:
        asked["dropout"] = dropout
    if scaling != query.shape[-1] ** -0.5:
        asked["scaling"] = scaling
    if asked:
        listed = ", ".join(f"{name} = {option}" for name, option in asked.items())
        raise ConfigError(
            f"{type(module).__name__} asks for {listed}; evovlm's attention is causal, over whole segments, "
            f"scaled by D ** -0.5, without dropout"
        )
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend(module.layer_idx, q, k, v)[None], None


AttentionInterface.register(ATTENTION, _attention)


class HFDecoder(nn.Module):
    """A causal language model of transformers behind the decoder protocol.

    It takes the model over: the model's attention is set to evovlm's, and no token is padding any more (transformers
    would give a padding token's embedding no gradient; packs have no padding).

    Args:
        causal_lm: Such as ``LlamaForCausalLM`` or ``Qwen3ForCausalLM``; may be on the meta device.

    Attributes:
        name: Class of the model, for messages.
        config: transformers' configuration.
        model: Its base model: embedding, layers, final norm.
        lm_head: Its output head.
        tp_plan: transformers' tensor-parallel plan: module path → style.

    Raises:
        ConfigError: Something of the model that the decoder protocol cannot keep: another attention than the
            registry's, rotary frequencies that depend on the data, a head with a bias or a scale.
    """

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        lm: Any = causal_lm
        self.name, self.config = type(lm).__name__, lm.config
        _check(lm)
        lm.set_attn_implementation(ATTENTION)
        if self.config._attn_implementation != ATTENTION:
            raise ConfigError(f"{type(lm).__name__} does not take its attention from transformers' registry")
        self.model, self.lm_head = lm.model, lm.lm_head
        self.tp_plan: dict[str, str] = dict(lm.tp_plan)
        self.model.embed_tokens.padding_idx = None

    @classmethod
    def from_directory(cls, directory: str | Path) -> "HFDecoder":
        """Build the model that a directory's ``config.json`` describes, with random weights and no code from there.

        Under ``torch.device("meta")`` nothing is allocated.

        Raises:
            ConfigError: As for the class.
        """
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        return cls(AutoModelForCausalLM.from_config(config, trust_remote_code=False))

    def tie_weights(self) -> None:
        """Make the head share the embedding's parameter where the configuration says so (again after ``to_empty``)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_buffers(self) -> None:
        """Compute the rotary frequencies again, in float32: ``to_empty`` loses them, and casts shorten them."""
        rotary = self.model.rotary_emb
        with torch.device("cpu"):
            fresh = type(rotary)(self.config)
        for name, buffer in fresh.named_buffers():
            setattr(rotary, name, nn.Buffer(buffer.to(rotary.inv_freq.device), persistent=False))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        visual: tuple[Tensor, Tensor] | None = None,
        head: Head | None = None,
    ) -> Tensor:
        """Run the decoder, or the part of it that a pipeline stage holds.

        Args:
            x: int64 ``[t]`` token ids, or hidden states ``[t, H]`` of the stage before. Under tensor parallelism hidden
                states are this rank's part of the t rows, ids and positions are all t.
            positions: ``[t]`` float32, possibly fractional.
            attend: How queries meet keys.
            visual: Rows int64 ``[n]`` and values ``[n, H]`` that replace the embeddings of those rows.
            head: What to make of the last hidden states ``[t, H]`` and the head's weight ``[V, H]``.

        Returns:
            What ``head`` returns; without one, the last hidden states ``[t, H]``.
        """
        embeddings = x if x.is_floating_point() else self.model.embed_tokens(x)
        if visual is not None:
            rows, values = visual
            # Fresh embeddings are written in place; hidden states belong to the caller.
            write = scatter_rows if embeddings is x else scatter_rows_
            embeddings = write(embeddings, rows, values.to(embeddings.dtype))
        output = self.model(
            inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False, attend=attend
        )
        hidden: Tensor = output.last_hidden_state[0]
        # Not a view: hooks of fully_shard sit on what a pipeline stage hands on.
        return hidden.clone() if head is None else head(hidden, self.lm_head.weight)


def _check(lm: Any) -> None:
    kind, config = type(lm).__name__, lm.config
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    names = {name for name, _ in lm.named_modules()}
    if absent := [part for part in parts if part not in names]:
        raise ConfigError(f"{kind} has no {', '.join(absent)}, which the decoder protocol presumes")
    if lm.lm_head.bias is not None:
        raise ConfigError(f"{kind} has a bias in its output head; the decoder protocol passes its weight alone")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ConfigError(
            f"{kind} has rope_type = {rope!r}: its frequencies depend on the longest position of the rows at hand, "
            "so the loss would depend on the layout; use 'default', 'linear', 'llama3' or 'yarn'"
        )
    if scaled := {name: value for name in _MULTIPLIERS if (value := getattr(config, name, None)) not in (None, 1.0)}:
        listed = ", ".join(f"{name} = {value}" for name, value in scaled.items())
        raise ConfigError(f"{kind} has {listed}: more than a linear embedding and a linear head")


def named_weights(source: str | Path | nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of a causal language model under the names of :class:`HFDecoder`.

    Args:
        source: A Hugging Face directory with ``config.json`` and safetensors, checked before the first tensor is read
            (names, shapes, shards); or a model in memory, an :class:`HFDecoder` or the model inside one.

    Returns:
        Pairs of name and tensor, in the dtype of the source; a tied head is not among them.

    Raises:
        CheckpointError: A shard or a tensor is missing, unexpected, damaged or of another shape.
        ConfigError: As for :class:`HFDecoder`.
    """
    if isinstance(source, nn.Module):
        return ((name, parameter.detach()) for name, parameter in source.named_parameters())
    with torch.device("meta"):
        decoder = HFDecoder.from_directory(source)
    prefix = LM_HEAD.removesuffix("lm_head.weight")  # as the shard reader spells a head
    expected = {prefix + name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    tensors = read_shards(Shards.open(source), expected, lambda name: (name,), lambda name: prefix + name)
    return starmap(lambda name, tensor: (name.removeprefix(prefix), tensor), tensors)


def save_causal_lm(
    decoder: HFDecoder,
    named_tensors: Iterable[tuple[str, Tensor]],
    out_dir: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Save weights, without a tokenizer, so that transformers' ``from_pretrained`` loads them.

    Args:
        decoder: Says which class of transformers, which configuration and which shapes; may be on the meta device.
        named_tensors: Every parameter once, on any device, in any order; consumed as a stream.
        out_dir: Directory to make; missing parents are made too.
        max_shard_bytes: Largest shard file.

    Raises:
        FileExistsError: ``out_dir`` exists.
        CheckpointError: Tensors are missing, surplus, repeated or of another shape than the model says.
    """
    out = Path(out_dir)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another directory")
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)  # may be left by an export that was interrupted
    writer = ShardWriter(partial, max_shard_bytes)
    left = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    config = deepcopy(decoder.config)
    for name, value in named_tensors:
        if left.pop(name, None) != tuple(value.shape):
            raise CheckpointError(
                f"cannot save: tensor {name} {list(value.shape)} does not belong to {decoder.name}, comes twice or has "
                "another shape there"
            )
        writer.add(name, value)
        config.dtype = value.dtype
    if left:
        raise CheckpointError(f"cannot save: {len(left)} tensors never came, such as {next(iter(left))}")
    writer.finish()
    config.architectures = [decoder.name]
    config.save_pretrained(partial)
    partial.rename(out)
