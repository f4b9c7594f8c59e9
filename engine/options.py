"""How the engine runs, apart from the layout: precision, recomputation, pipeline schedule, what is frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evovlm.engine.recompute import Recompute
from evovlm.engine.settings import KernelSettings, Precision
from evovlm.engine.vision import Activations
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.pipeline import Schedule


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine runs, apart from the layout.

    Attributes:
        precision: ``float32``, ``bfloat16`` (float32 master weights and reductions) or ``float64``.
        recompute: Module → activation checkpointing.
        freeze: Modules that are not trained.
        schedule: Pipeline schedule.
        virtual_stages: Pipeline stages of each rank; more than one needs another schedule than ``1f1b``.
        encode_tiles: Tiles that a rank encodes at a time.
        encoder_activations: ``keep`` the encoder's activations of a step, ``recompute`` chunk by chunk, or ``auto``:
            keep them in steps whose busiest encoder stays within ``encoder_memory``.
        encoder_memory: GiB of activations of the encoder that a rank may keep in ``auto``.
        min_unit: Blocks of fewer parameters are gathered with their module (see ``shard_module``).
        kernels: Which kernels compute.
    """

    precision: Precision = "float32"
    recompute: Mapping[str, Recompute] | None = None
    freeze: Sequence[str] = ()
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    encode_tiles: int = 32
    encoder_activations: Activations = "auto"
    encoder_memory: float = 8.0
    min_unit: int = 0
    kernels: KernelSettings = field(default_factory=KernelSettings)

    def check(self, plan: ParallelPlan) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: The message names the settings and what to change.
        """
        llm = plan.llm
        if self.virtual_stages > 1 and (llm.pp == 1 or self.schedule == "1f1b"):
            raise ValueError(
                f"virtual_stages = {self.virtual_stages} with pp = {llm.pp} and schedule {self.schedule!r}: several "
                'stages on a rank need pp > 1 and schedule = "interleaved" or "zero_bubble"'
            )
        if llm.pp == 1 or self.schedule != "zero_bubble":
            return
        if llm.zero != 1:
            raise ValueError(
                f"the zero-bubble schedule computes weight gradients apart from the rest, so they cannot be reduced "
                f"after each microbatch: it needs zero = 1 in the LLM's layout, which has zero = {llm.zero}"
            )
        if "llm" in self.freeze:
            raise ValueError("the zero-bubble schedule defers weight gradients, and a frozen LLM has none: use 1f1b")
        if (self.recompute or {}).get("llm", "none") != "none":
            raise ValueError(
                "the zero-bubble schedule runs each backward in two halves, and recomputation would run twice: "
                'set recompute of the LLM to "none", or use 1f1b'
            )
        if self.kernels.compile == "block" or self.kernels.linear == "te":
            key = 'compile = "block"' if self.kernels.compile == "block" else 'linear = "te"'
            raise ValueError(
                f"[kernels] {key}: the zero-bubble schedule runs each backward in two halves, and these layers have it "
                "in one: use 1f1b, or the default of that key"
            )
