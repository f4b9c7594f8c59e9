"""The settings that decide what a step is made of."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from evovlm.data.step_plan import LossWeighting


class PlanSettings(BaseModel):
    """What a step is made of, and how it is shared out.

    Attributes:
        seed: seed of the run, for everything random about its data.
        pack_tokens: tokens of a pack; every microbatch has this length.
        pack_tiles: most tiles of a pack.
        packs_per_step: packs of a step (G), over all ranks and microbatches.
        loss_weighting: weight of a target in a sample with n of them: 1, 1/n or 1/√n.
        window: samples that are packed together.
        even_packs: whether packs of a window are made to cost alike (attention: squared lengths) as far as that costs
            no fill. "auto": where no sample is longer than half a pack. Longer ones make packs that nothing can even
            out; a rank is then balanced by giving it cheap packs besides, and these must be left.
        balance_steps: steps whose packs are dealt out together, so that they cost alike.
        long_samples: what becomes of samples that do not fit into an empty pack. "skip": left out, counted and listed;
            "error"; "split": texts are cut into packs' lengths, each part a segment of its own, other samples skipped,
            and preference pairs, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    pack_tokens: int = Field(16384, gt=0, le=2**20)
    pack_tiles: int = Field(48, ge=0, lt=2**31)
    packs_per_step: int = Field(gt=0)
    loss_weighting: LossWeighting = "square"
    window: int = Field(16384, gt=0, lt=2**31)
    even_packs: Literal["auto", "always", "never"] = "auto"
    balance_steps: int = Field(1, gt=0)
    long_samples: Literal["skip", "error", "split"] = "skip"
