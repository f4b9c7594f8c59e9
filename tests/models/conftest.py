"""A small model that the tests of this folder share."""

from collections.abc import Callable

import pytest
import torch

from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.internvl import InternVL


@pytest.fixture(scope="session")
def small_config() -> InternVLConfig:
    """Four visual tokens a tile, grouped queries, drop path."""
    return InternVLConfig(
        vision=VisionConfig(
            hidden_size=16, num_layers=3, num_heads=2, ffn_size=24, tile_size=8, patch_size=2, drop_path_rate=0.5
        ),
        decoder=DecoderConfig(
            vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24
        ),
    )


@pytest.fixture(scope="session")
def make_model() -> Callable[[InternVLConfig], InternVL]:
    """Factory of float64 models in which every parameter matters: no zeros, no ones."""

    def make(config: InternVLConfig) -> InternVL:
        model = InternVL(config).double().eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                vector = parameter.ndim == 1 and not name.endswith("bias")
                parameter.copy_(1 + 0.2 * noise if vector else 0.3 * noise)
        return model

    return make
