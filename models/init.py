"""Random weights that depend on the seed and a parameter's name alone, so every layout starts the same.

key("init", seed, "mlp1.1.weight") ─► generator ─► the whole tensor ─► each rank keeps its shard
"""

import torch
from torch import Tensor

from evovlm.csrc.random import key
from evovlm.models.config import InternVLConfig
from evovlm.models.hf.qkv import by_head


def initial_value(name: str, shape: torch.Size, config: InternVLConfig, seed: int) -> Tensor:
    """Make the initial value of one parameter, float32 on the CPU.

    Matrices are normal with the module's ``initializer_range``; the projector's with 1/√(inputs) so that its random
    start neither drowns nor swamps the text embeddings; norms start at 1, layer scales at their configured value and
    biases at 0. Values are drawn in the order of published checkpoints, so a start does not depend on how evovlm orders
    rows.
    """
    if name.endswith((".ls1", ".ls2")):
        return torch.full(shape, config.vision.layer_scale_init)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if name.startswith("mlp1."):
        std = float(shape[-1]) ** -0.5
    elif name.startswith("vision_model."):
        std = config.vision.initializer_range
    else:
        std = config.decoder.initializer_range
    generator = torch.Generator().manual_seed(key("init", seed, name) >> 1)
    published = torch.empty(shape).normal_(0.0, std, generator=generator)
    return by_head(name, published, config.vision.num_heads)
