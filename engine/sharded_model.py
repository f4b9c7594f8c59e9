"""A model sharded by a plan, and its forward pass; ``engine.py`` adds gradients and an optimizer.

build     model on meta ─ shard each module by its own layout ─ allocate ─ weights (named stream)
forward   tiles ─► encode, exchange ─► LLM, microbatch by microbatch ─► an objective's numbers
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from evovlm.data.step_batch import StepBatch
from evovlm.engine.language import Language
from evovlm.engine.objectives import CrossEntropy, Objective
from evovlm.engine.options import EngineOptions
from evovlm.engine.parts import NamedTensors, Parts, build_parts, load_weights
from evovlm.engine.settings import DTYPES
from evovlm.engine.vision import Vision, VisualTokens
from evovlm.models.sharding import INTERNVL, ModelTables
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.world import World


class ShardedModel:
    """A sharded model. Use :meth:`build_model`.

    Attributes:
        parts: What this rank holds.
        language: Its pipeline stages of the LLM.
        vision: Encoder and exchange; None for a model without images.
        world: The ranks of the run.
    """

    def __init__(self, parts: Parts, language: Language, vision: Vision | None, world: World) -> None:
        self.parts, self.language, self.vision, self.world = parts, language, vision, world

    @staticmethod
    def build_model(
        make_model: Callable[[], nn.Module],
        plan: ParallelPlan,
        world: World,
        *,
        weights: NamedTensors,
        options: EngineOptions | None = None,
        tables: ModelTables = INTERNVL,
    ) -> "ShardedModel":
        """Build a model straight into its sharded form: no rank ever holds it whole. Collective.

        Args:
            make_model: Constructor, called on the meta device.
            plan: Layouts of the modules.
            world: The ranks of the run.
            weights: Every parameter, by name, in any order; consumed as a stream, the same on each rank.
            options: How to run.
            tables: How the model is sharded.

        Raises:
            ValueError: The plan is for another number of ranks; a weight is missing, unknown or of another shape; a
                frozen module does not exist; options do not go together.
        """
        options = options or EngineOptions()
        if plan.size != world.size:
            raise ValueError(f"the plan ({plan}) is for {plan.size} ranks, but {world.size} were started")
        options.check(plan)
        dtypes = DTYPES[options.precision]
        parts = build_parts(
            make_model,
            tables,
            plan,
            world,
            master=dtypes.master,
            compute=None if dtypes.compute == dtypes.master else dtypes.compute,
            recompute=options.recompute or {},
            freeze=options.freeze,
            min_unit=options.min_unit,
            virtual_stages=options.virtual_stages,
            kernels=options.kernels,
        )
        load_weights(parts, weights)
        vision = None
        if parts.encoder:
            vision = Vision(
                parts,
                plan,
                world,
                encode_tiles=options.encode_tiles,
                activations=options.encoder_activations,
                memory=options.encoder_memory * 2**30,
            )
        language = Language(parts.stages, parts.hidden_size, dtypes.compute, options.schedule, world.device)
        return ShardedModel(parts, language, vision, world)

    @torch.no_grad()
    def evaluate(self, steps: Iterable[StepBatch]) -> tuple[float, float]:
        """Sum weighted loss and weights over steps and ranks; their quotient is the validation loss. Collective."""
        objective = CrossEntropy(1.0, self.world.device)
        for batch in steps:
            self.forward(batch, objective)
        dist.all_reduce(objective.sums)
        return float(objective.sums[0]), float(objective.sums[1])

    @torch.no_grad()
    def forward(self, batch: StepBatch, objective: Objective, *, drop_path: bool = False) -> None:
        """Run a step forward, for what the objective counts. Collective.

        Args:
            batch: This rank's part of the step.
            objective: What is counted.
            drop_path: Drop the paths that training on the same batch drops.
        """
        for part in self.parts:
            part.root.train(drop_path)
        self.language.evaluate(batch.packs, self._encode(batch), objective)

    def _encode(self, batch: StepBatch) -> VisualTokens | None:
        if self.vision is None:
            return None
        return self.vision.encode(batch, self.language.shards(len(batch.packs[0].tokens)))
