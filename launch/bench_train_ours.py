"""Our ranks in ``bench train``: the engine on steps of the planner, as a run has them.

index ─ Planner ─► Loader ─► StepBatch ─► Engine.train_step
"""

from functools import partial

from evovlm.data.index import Index
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import StepPlan
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.engine import Engine
from evovlm.engine.model_source import random_weights
from evovlm.engine.options import EngineOptions
from evovlm.engine.settings import OptimSettings
from evovlm.launch.bench_train_samples import Task, load_steps
from evovlm.models.internvl import InternVL
from evovlm.parallel.layout import Layout, ParallelPlan, Zero
from evovlm.parallel.world import World

MIN_UNIT = 1_000_000
"""Parameters below which a block is gathered with its module, as a run's settings have it."""


class OurTrainer:
    """The engine and its steps on one rank.

    Args:
        world: The ranks; every one is a data-parallel rank and an encoder.
        data: Index and tokenizer.
        task: Model and steps.
        steps: How many steps are loaded.
        zero: ZeRO level of all modules.
    """

    def __init__(self, world: World, data: tuple[Index, Tokenizer], task: Task, steps: int, zero: Zero) -> None:
        self._steps: list[tuple[StepPlan, StepBatch]] = load_steps(data, task, world.rank, world.size, steps)
        self.engine = Engine.build(
            partial(InternVL, task.model),
            ParallelPlan.for_llm(Layout(dp=world.size, zero=zero)),
            world,
            optim=OptimSettings(lr=task.lr, weight_decay=0.0),
            weights=random_weights(task.model, task.seed),
            options=EngineOptions(min_unit=MIN_UNIT),
        )

    def step(self, number: int) -> float:
        """Train a step; returns its loss."""
        plan, batch = self._steps[number]
        return self.engine.train_step(batch, plan.loss_denominator).loss
