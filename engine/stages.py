"""What differs between the stages of training: small tables over one trainer.

| | pretrain (native, spec §6.1) | sft |
|---|---|---|
| visual stride δ | drawn for each image from 1, 1/2, …, 1/256 | fixed 1/4, the best published |
| language : multimodal tokens | 1 : 3 | as the data is |
| loss weight of a token | 1/√n (square) | 1/√n (square) |
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from evovlm.data.batch import V2PESettings
from evovlm.data.step_plan import LossWeighting


class Stage(BaseModel):
    """What every stage says about the data and the loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    v2pe: V2PESettings
    language_ratio: str
    """``language:multimodal`` in tokens, such as ``"1:3"``; ``natural``: as the data is."""
    weighting: LossWeighting = "square"
    """Loss weight of a supervised token of a sample with n of them: 1, 1/n or 1/√n (spec §3.5)."""


class PretrainStage(Stage):
    """Native multimodal pre-training: all parameters, text and images together from the first step."""

    name: Literal["pretrain"]
    v2pe: V2PESettings = V2PESettings(mode="random")
    language_ratio: str = "1:3"


class SFTStage(Stage):
    """Supervised fine-tuning on conversations."""

    name: Literal["sft"]
    v2pe: V2PESettings = V2PESettings(mode="fixed", delta=0.25)
    language_ratio: str = "natural"
