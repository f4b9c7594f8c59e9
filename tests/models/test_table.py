"""The seven published sizes have the published numbers of parameters (spec §1.1)."""

import pytest
import torch
from torch import nn

from evovlm.models.hf.names import model_shapes
from evovlm.models.table import QWEN_VOCAB, SIZES, TINY, VIT_6B, VIT_300M, count, num_parameters, size

TOTALS = {
    "1B": 938_193_024,
    "2B": 2_088_957_440,
    "8B": 7_944_373_760,
    "9B": 9_141_898_240,
    "14B": 15_117_256_704,
    "38B": 38_388_164_992,
    "78B": 78_408_318_336,
}
PROJECTORS = {
    "1B": 4_482_816,
    "2B": 8_662_016,
    "8B": 27_540_480,
    "9B": 33_570_816,
    "14B": 47_204_352,
    "38B": 91_786_240,
    "78B": 172_008_448,
}
VITS = {"38B": 5_536_496_000, "78B": 5_536_496_000}
VIT_300M_PARAMETERS = 304_012_288


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_counts(name: str) -> None:
    parts = num_parameters(SIZES[name])
    assert parts["total"] == parts["vit"] + parts["projector"] + parts["llm"] == TOTALS[name]
    assert parts["projector"] == PROJECTORS[name]
    assert parts["vit"] == VITS.get(name, VIT_300M_PARAMETERS)


def test_the_names_that_are_streamed_are_the_parameters() -> None:
    for config in (TINY, SIZES["38B"]):
        streamed = sum(torch.Size(shape).numel() for shape in model_shapes(config).values())
        assert streamed == num_parameters(config)["total"]


def test_vits_are_the_published_ones() -> None:
    # Spec §1.2, what parameter counts do not show.
    assert (VIT_300M.num_heads, VIT_300M.norm, VIT_300M.qkv_bias, VIT_300M.qk_norm) == (16, "layer_norm", True, False)
    assert (VIT_6B.num_heads, VIT_6B.norm, VIT_6B.qkv_bias, VIT_6B.qk_norm) == (25, "rms_norm", False, True)
    assert {config.vision.norm_eps for config in SIZES.values()} == {1e-6}
    assert {config.vision.layer_scale_init for name, config in SIZES.items() if name != "tiny"} == {0.1}


def test_decoders_are_the_published_ones() -> None:
    for name, config in SIZES.items():
        decoder = config.decoder
        assert not decoder.tie_embeddings  # InternVL unties every size
        if name in ("tiny", "9B"):
            continue
        assert (decoder.family, decoder.vocab_size, decoder.rope_theta, decoder.norm_eps, decoder.max_positions) == (
            "qwen2",
            QWEN_VOCAB,
            1e6,
            1e-6,
            32768,
        )
    nine = SIZES["9B"].decoder
    assert (nine.family, nine.rope_theta, nine.norm_eps, nine.qkv_bias) == ("internlm3", 5e7, 1e-5, False)


def test_a_size_takes_the_vocabulary_of_a_tokenizer() -> None:
    assert size("tiny", vocab_size=777).decoder.vocab_size == 777
    assert size("tiny") is TINY


def test_an_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'7B'.*tiny, 1B, 2B, 8B, 9B, 14B, 38B, 78B"):
        size("7B")


def test_shared_parameters_count_once() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    assert count([weight, nn.Parameter(torch.zeros(2)), weight]) == 14
