"""Activation checkpointing of blocks: keep everything, recompute all, or recompute all but the costly matmuls.

none       activations of a block are kept                        fastest, most memory
selective  outputs of matmuls and attention are kept, the rest (norms, activations, rotary) is recomputed
full       only a block's input is kept                           slowest, least memory
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from evovlm.parallel.sharded_data import find_modules

Recompute = Literal["none", "selective", "full"]

_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "evovlm::attention",
    "evovlm::prefix_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
}
"""By name: operators of packages that are not installed are not there to be compared with."""


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward of what runs inside: each piece of memory once, weights left out.

    Attributes:
        count: Bytes so far.
    """

    def __init__(self) -> None:
        self.count, self._seen = 0, set[int]()
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.count += storage.nbytes()
        return tensor


def apply_recompute(root: nn.Module, blocks: str, mode: Recompute) -> None:
    """Wrap the forward of blocks in checkpointing; parameter names do not change. Call before sharding over data ranks.

    Args:
        root: A module of the model, changed in place.
        blocks: Path pattern of its blocks.
        mode: What is kept.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for _, block in find_modules(root, blocks):
        if next(block.parameters(), None) is None:
            continue  # another pipeline stage holds it
        # On the instance, so that hooks of fully_shard still run around it and state dicts keep their names.
        block.forward = partial(checkpoint, block.forward, **options)
