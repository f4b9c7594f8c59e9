"""What differs between the stages of training: small tables over one trainer.

| | pretrain (native, spec §6.1) | sft | mpo (spec §4) | prm (spec §5) |
|---|---|---|---|---|
| index of | conversations | conversations | preference pairs | conversations: steps, "+" or "-" |
| visual stride δ | drawn for each image from 1, 1/2, …, 1/256 | fixed 1/4, the best published | fixed 1/4 | fixed 1/4 |
| language : multimodal tokens | 1 : 3 | as the data is | as the data is | as the data is |
| loss | cross-entropy | cross-entropy | DPO, BCO and cross-entropy of chosen answers | cross-entropy |
| loss weight of a token | 1/√n (square) | 1/√n (square) | 1 | 1/√n (square) |
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from evovlm.data.batch import V2PESettings
from evovlm.data.step_plan import LossWeighting
from evovlm.engine.preference_loss import PreferenceLossSettings


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


class MPOStage(Stage):
    """Mixed preference optimisation on pairs of a chosen and a rejected answer."""

    name: Literal["mpo"]
    v2pe: V2PESettings = V2PESettings(mode="fixed", delta=0.25)
    language_ratio: str = "natural"
    weighting: Literal["token"] = "token"
    """The cross-entropy of chosen answers is a mean over their tokens."""
    loss: PreferenceLossSettings = PreferenceLossSettings()
    """Terms of the loss, and their weights."""


class PRMStage(Stage):
    """Process reward model: fine-tuning on the conversations that ``evovlm prm build`` writes."""

    name: Literal["prm"]
    v2pe: V2PESettings = V2PESettings(mode="fixed", delta=0.25)
    language_ratio: str = "natural"
