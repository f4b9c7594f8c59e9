"""The settings of a run, typed; a recipe is one of these written as TOML.

Every class forbids unknown keys. A stage is not another trainer: it is a small table of what differs
(:mod:`evovlm.engine.stages`).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evovlm.data.curriculum import Phase
from evovlm.engine.recompute import Recompute
from evovlm.engine.stages import MPOStage, PretrainStage, PRMStage, SFTStage
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.pipeline import Schedule

Precision = Literal["float32", "bfloat16", "float64"]
Module = Literal["vit", "projector", "llm"]


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of a precision: master weights, and what forward and backward compute in."""

    master: torch.dtype
    compute: torch.dtype


DTYPES: dict[Precision, Dtypes] = {
    "float32": Dtypes(torch.float32, torch.float32),
    "bfloat16": Dtypes(torch.float32, torch.bfloat16),
    "float64": Dtypes(torch.float64, torch.float64),
}


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Settings):
    """Which model, and where its weights come from.

    Weights come from exactly one of: ``from_dir`` (an InternVL directory in either published format, or an evovlm
    export), ``vit_from`` and ``llm_from`` together (native pre-training: the projector is random), or ``size`` alone
    (random weights).
    """

    size: str | None = None
    """Name of a size (``evovlm models`` lists them): random weights."""
    from_dir: Path | None = None
    """Directory of a whole model."""
    vit_from: Path | None = None
    """Directory of a ViT checkpoint."""
    llm_from: Path | None = None
    """Directory of a base language model."""
    tokenizer: Path | None = None
    """Tokenizer directory; the one in ``from_dir`` or ``llm_from`` by default."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Drop path rate of the ViT's last block."""
    freeze: tuple[Module, ...] = ()
    """Modules that are not trained."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSettings":
        parts = self.vit_from is not None or self.llm_from is not None
        if (self.vit_from is None) != (self.llm_from is None):
            raise ValueError("vit_from and llm_from go together: both start native pre-training")
        given = [self.size is not None, self.from_dir is not None, parts]
        if sum(given) != 1:
            raise ValueError("give exactly one of: size, from_dir, or vit_from with llm_from")
        return self


class DataSettings(Settings):
    """What is read, and how it is packed into steps."""

    index: Path
    """Index directory, made by ``evovlm index``."""
    val_index: Path | None = None
    """Index of held-out data for the validation loss."""
    test_index: Path | None = None
    """Index of test questions, one dataset per task, for ``evovlm evaluate``."""
    pack_tokens: int = Field(16384, gt=0, le=2**20)
    """T, tokens of one pack."""
    pack_tiles: int = Field(48, gt=0)
    """Most tiles of one pack."""
    packs_per_step: int = Field(gt=0)
    """G, packs of one optimizer step over all ranks; fixed by the recipe, whatever the layout."""
    window: int = Field(16384, gt=0)
    """Samples that are packed together."""
    even_packs: Literal["auto", "always", "never"] = "auto"
    """Make packs cost alike as far as that costs no fill; auto: where no sample is longer than half a pack."""
    balance_steps: int = Field(1, ge=1)
    """Steps whose packs are dealt out together, so that they cost alike."""
    long_samples: Literal["skip", "error", "split"] = "skip"
    """Samples longer than a pack: skipped and listed, an error, or (texts) split into segments of a pack's length."""
    weights: dict[str, float] = {}
    """Sampling weight per dataset of the index; absent means its number of samples times its repeat_time."""
    phases: tuple[Phase, ...] = ()
    """Steps at the beginning of the run with datasets or weights of their own."""
    replacement: bool = False
    """Draw with replacement by weight instead of passing over every sample."""
    normalize: Literal["imagenet", "clip", "siglip"] = "imagenet"
    """Mean and deviation that pixels are normalised with."""
    num_workers: int = Field(2, ge=0)
    """Processes of each rank that decode images ahead; 0: the thread that plans steps decodes them."""
    prefetch: int = Field(2, ge=1)
    """Steps that are made ready ahead."""


class OptimSettings(Settings):
    """AdamW and its schedule."""

    lr: float = Field(gt=0)
    lr_scale: dict[Module, Annotated[float, Field(ge=0)]] = {}
    """Factor on ``lr`` per module."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 means no clipping."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0)
    """Below 1: share of the run; otherwise steps."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)


class LayoutSettings(Settings):
    """Layout of one module over all ranks of the run; data parallelism fills what the other axes leave."""

    tp: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    zero: Literal[1, 2, 3] = 3
    shard: int = Field(0, ge=0)
    """Ranks that share one copy of the state; 0 means all that hold the same part of the model."""

    def layout(self, name: str, ranks: int) -> Layout:
        """Lay the module out over the ranks of a run.

        Raises:
            ValueError: The axes do not divide the number of ranks.
        """
        axes = self.model_dump()
        product = math.prod(axes.get(axis, 1) for axis in ("pp", "cp", "hp", "tp"))
        if ranks % product:
            named = " · ".join(f"{axis} {axes[axis]}" for axis in ("pp", "cp", "hp", "tp") if axes.get(axis, 1) > 1)
            raise ValueError(
                f"[parallel.{name}] {named} = {product} does not divide the run's {ranks} ranks; "
                f"start a multiple of {product} ranks, or lower an axis"
            )
        return Layout(dp=ranks // product, **axes)


class LLMLayoutSettings(LayoutSettings):
    """Layout of the LLM."""

    pp: int = Field(1, ge=1)
    """Pipeline stages."""
    cp: int = Field(1, ge=1)
    """Context-parallel ranks: a ring over the sequence."""
    hp: int = Field(1, ge=1)
    """Head-parallel ranks: all-to-all around attention."""
    placement: Literal["head_first", "context_first"] = "head_first"
    """Which of hp and cp are neighbouring ranks."""
    window: int = Field(0, ge=0)
    """Ranks of a cp ring's inner rings; 0 means one ring."""


class ParallelSettings(Settings):
    """Layouts of the three modules, and how the pipeline and the vision exchange run."""

    vit: LayoutSettings = LayoutSettings()
    projector: LayoutSettings = LayoutSettings()
    llm: LLMLayoutSettings = LLMLayoutSettings()
    schedule: Schedule = "1f1b"
    """Pipeline schedule: ``1f1b``, ``interleaved`` or ``zero_bubble``."""
    virtual_stages: int = Field(1, ge=1)
    """Stages of each pipeline rank; more than one needs the schedule ``interleaved`` or ``zero_bubble``."""
    encode_tiles: int = Field(32, ge=1)
    """Tiles that a rank encodes at a time; one chunk's visual tokens travel while the next is encoded."""
    encoder_activations: Literal["auto", "keep", "recompute"] = "auto"
    """Whether the encoder's activations of a whole step are kept, or each chunk is encoded again in its backward."""
    encoder_memory: float = Field(8.0, gt=0)
    """GiB of such activations that a rank may keep under ``auto``; steps with more are recomputed."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds after which a collective that some rank has not joined ends the run with an error."""
    cost_model: Path | None = None
    """What steps cost, measured by ``evovlm calibrate``; by default counted from the model's shape."""
    node_ranks: int = Field(0, ge=0)
    """Ranks of a node, so that visual tokens stay inside it where that costs nothing; 0: as the launcher says."""
    min_unit: int = Field(1_000_000, ge=0)
    """Blocks of fewer parameters are gathered with the module around them."""

    def plan(self, ranks: int) -> ParallelPlan:
        """Lay every module out over the ranks of a run.

        Raises:
            ValueError: A layout does not fit that number of ranks.
        """
        return ParallelPlan(
            vit=self.vit.layout("vit", ranks),
            projector=self.projector.layout("projector", ranks),
            llm=self.llm.layout("llm", ranks),
        )


class RecomputeSettings(Settings):
    """Activation checkpointing per module."""

    vit: Recompute = "none"
    llm: Recompute = "none"


class FP8Skip(Settings):
    """What keeps to 16 bits under FP8, besides what always does: embeddings, norms, attention and the output head."""

    modules: tuple[Module, ...] = ("vit", "projector")
    """Modules none of whose linear layers compute in FP8."""
    first: int = Field(0, ge=0)
    """First blocks of each module that keep to 16 bits."""
    last: int = Field(0, ge=0)
    """Last blocks of each module that keep to 16 bits."""


class KernelSettings(Settings):
    """Which kernels compute; ``evovlm doctor`` lists what a machine has. A choice that it lacks is an error."""

    attention: Literal["auto", "flash_attn", "torch"] = "auto"
    """On CUDA: flash-attn's kernels, torch's built-in ones, or the fastest that is there."""
    linear: Literal["torch", "te"] = "torch"
    """Linear layers of blocks and projector: torch's, or transformer-engine's, which FP8 needs."""
    fp8: Literal["none", "delayed", "current", "block", "mxfp8"] = "none"
    """FP8 recipe of transformer-engine: delayed, current or block scaling; mxfp8 from sm_100 on."""
    fp8_skip: FP8Skip = FP8Skip()
    norm: Literal["auto", "evovlm", "torch", "te", "apex"] = "auto"
    """RMSNorm and LayerNorm; evovlm has the former alone, the latter is then torch's."""
    adam: Literal["torch", "te", "apex"] = "torch"
    """Fused AdamW of torch, transformer-engine or apex; all keep the same state."""
    compile: Literal["none", "block"] = "none"
    """torch.compile: one graph for all blocks of the ViT, one for all of the LLM."""
    cuda_graphs: bool = False
    """Replay the LLM's compiled blocks as CUDA graphs, where their weights stay in place."""


class ReferenceSettings(Settings):
    """The reference model of stage ``mpo``: what the policy is compared with."""

    mode: Literal["precompute", "resident"] = "precompute"
    """``precompute``: one pass over the index before training, kept beside it, and no second model in memory;
    ``resident``: a second, frozen model that scores each step."""
    from_dir: Path | None = None
    """Directory of the reference model; by default the weights that the run starts from."""
    cache: Path | None = None
    """File that the scores of ``precompute`` are kept in; by default one beside the index, named by what it holds."""
    parallel: ParallelSettings | None = None
    """Layouts of a ``resident`` reference model; by default those of the policy."""

    @model_validator(mode="after")
    def _fits_mode(self) -> "ReferenceSettings":
        if self.mode == "precompute" and self.parallel is not None:
            raise ValueError('[reference.parallel] lays out a resident model: set [reference] mode = "resident"')
        if self.mode == "resident" and self.cache is not None:
            raise ValueError('a resident reference model keeps no scores: drop cache, or set mode = "precompute"')
        return self


class CheckpointSettings(Settings):
    """When to save, and how much to keep."""

    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 means only at the end."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay on disk."""


class LogSettings(Settings):
    """What is written while training."""

    every: int = Field(1, ge=1)
    """Steps between log lines."""
    tensorboard: bool = True
    plan_hash_every: int = Field(50, ge=1)
    """Steps between comparisons of the plan's hash across ranks."""
    peak_tflops: float | None = None
    """Peak of one rank for MFU; by default known from the device, or measured on a CPU."""


class RunSettings(Settings):
    """Everything that defines a run."""

    out: Path
    """Run directory."""
    stage: Annotated[PretrainStage | SFTStage | MPOStage | PRMStage, Field(discriminator="name")]
    model: ModelSettings
    data: DataSettings
    optim: OptimSettings
    steps: int | None = Field(None, gt=0)
    """Optimizer steps; or give ``epochs``."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the mixture; or give ``steps``."""
    seed: int = 0
    precision: Precision = "float32"
    parallel: ParallelSettings = ParallelSettings()
    recompute: RecomputeSettings = RecomputeSettings()
    kernels: KernelSettings = KernelSettings()
    reference: ReferenceSettings = ReferenceSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()
    validate_every: int = Field(0, ge=0)
    """Steps between validation passes; 0 means only at the end."""
    export: Literal["internvl", "transformers", "none"] = "transformers"
    """Format of the Hugging Face directory written at the end."""
    ranks: int = Field(1, ge=1)
    """Local processes that ``evovlm train`` starts when nothing else has started them."""

    @model_validator(mode="after")
    def _one_length(self) -> "RunSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of: steps, epochs")
        if self.data.val_index is None and self.validate_every:
            raise ValueError("validate_every needs [data] val_index")
        return self

    @model_validator(mode="after")
    def _preference(self) -> "RunSettings":
        if self.stage.name != "mpo":
            if self.reference != ReferenceSettings():
                raise ValueError(f'[reference] belongs to stage "mpo", this is "{self.stage.name}": drop it')
            return self
        if self.data.long_samples == "split":
            raise ValueError('a preference pair is never split over packs: set [data] long_samples = "skip" or "error"')
        if self.reference.mode == "precompute" and self.stage.loss.needs_reference:
            remedy = 'set [reference] mode = "resident"'
            if self.model.drop_path:
                raise ValueError(
                    f"[model] drop_path = {self.model.drop_path}: scores of a reference model that were made before "
                    f"know nothing of the paths that a step drops; set it to 0, or {remedy}"
                )
            if self.stage.v2pe.mode == "random":
                raise ValueError(
                    f'[stage.v2pe] mode = "random" draws strides anew at each visit; fix them, or {remedy}'
                )
        return self
