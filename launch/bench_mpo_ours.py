"""Our side of ``evovlm bench mpo``: epochs of mixed preference optimisation by the engine, as a run has them.

index ─ Planner ─► Loader ─┬─► score_index ─► log π_ref                     the reference pass
                           └─► PreferenceTraining.train_step                the epoch
                                 ▲ as planned, or with one idea switched off (``bench_mpo_switches.py``)
"""

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evovlm.data.index import Index
from evovlm.data.loader import Loader
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Order, Sequential
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import DataLayout
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.cost_shape import shape_costs
from evovlm.engine.engine import Engine
from evovlm.engine.model_source import random_weights
from evovlm.engine.options import EngineOptions
from evovlm.engine.preference import PreferenceTraining
from evovlm.engine.preference_loss import PreferenceLossSettings
from evovlm.engine.reference import PrecomputedReference, Reference, ResidentReference
from evovlm.engine.reference_pass import score_index
from evovlm.engine.settings import OptimSettings
from evovlm.engine.sharded_model import ShardedModel
from evovlm.launch.bench_mpo_pairs import Task
from evovlm.launch.bench_mpo_switches import Switches, rearrange
from evovlm.models.internvl import InternVL
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

LOSS = PreferenceLossSettings()
"""Weights 0.8, 0.2, 1 and β = 0.1."""
_PLAN = ParallelPlan.for_llm(Layout(zero=1))
# A few tiles at a time were 5 to 10 % faster than all of a step on a processor; TRL's batches are chosen alike.
_OPTIONS = EngineOptions(min_unit=1_000_000, encode_tiles=4)


@dataclass(frozen=True)
class Epoch:
    """What one pass over all pairs took, on either side.

    Attributes:
        reference_seconds: Of the reference pass before it; 0 with a resident reference model, which is in the other.
        train_seconds: Of the training steps.
        losses: Of the steps.
        first: Samples of the first step, in the groups that were averaged over on their own.
        reference: Float64 ``[pairs, 2]``, log π_ref of the index's pairs; None with a resident reference model.
    """

    reference_seconds: float
    train_seconds: float
    losses: list[float]
    first: list[list[int]]
    reference: NDArray[np.float64] | None

    @property
    def seconds(self) -> float:
        """Reference pass counted in."""
        return self.reference_seconds + self.train_seconds


class OurTrainer:
    """Trains on one rank, with all threads of the process.

    Args:
        world: The one rank.
        data: Index and tokenizer.
        task: Model and pairs.
    """

    def __init__(self, world: World, data: tuple[Index, Tokenizer], task: Task) -> None:
        self._world, self._index, self._tokenizer, self._task = world, data[0], data[1], task
        self._planner = self._plan(Mixture(self._index, MixtureSettings(), task.seed))
        self.num_steps = self._planner.num_packs(1)
        self._engine: Engine | None = None

    def epoch(self, *, resident: bool = False) -> Epoch:
        """Train on all pairs once, from the initial weights.

        Args:
            resident: Keep a second model that scores each step, instead of scoring all pairs before.
        """
        engine = self._engine = self._build()
        scored, reference_seconds = None, 0.0
        reference: Reference
        if resident:
            reference = ResidentReference(self._build_model())
        else:
            began = time.perf_counter()
            scored = self.score(engine)
            reference_seconds = time.perf_counter() - began
            reference = PrecomputedReference(self._index, scored)
        training = PreferenceTraining(engine, LOSS)
        first: list[list[int]] = []
        losses = []
        began = time.perf_counter()
        for plan, batch in self._loader(self._planner).steps(0, self.num_steps):
            first = first or [plan.packs.samples.tolist()]
            losses.append(training.train_step(batch, reference.log_probs(plan, batch), plan.num_chosen).step.loss)
        return Epoch(reference_seconds, time.perf_counter() - began, losses, first, scored)

    def score(self, model: ShardedModel) -> NDArray[np.float64]:
        """Score all pairs; a file of scores is written, as in a run."""
        with tempfile.TemporaryDirectory() as folder:
            return score_index(
                lambda: model,
                self._index,
                Path(folder, "scores.safetensors"),
                {},
                lambda scored: self._loader(self._plan(Sequential(self._index, scored))),
                self._world,
                lambda _line: None,
            )

    def switched(self, ways: dict[str, Switches], repetitions: int) -> dict[str, float]:
        """Train with ideas switched off, in turn; data are loaded and references known before.

        Returns:
            Name of each way → fewest seconds of an epoch.
        """
        engine = self._engine or self._build()
        scores = self.score(engine)
        steps = [batch for _, batch in self._loader(self._planner).steps(0, self.num_steps)]
        arranged = {
            name: [made for batch in steps for made in rearrange(batch, switches)] for name, switches in ways.items()
        }
        training = PreferenceTraining(engine, LOSS)
        least = dict.fromkeys(ways, float("inf"))
        for _ in range(repetitions):
            for name, batches in arranged.items():
                began = time.perf_counter()
                for batch in batches:
                    self._train(training, batch, scores)
                least[name] = min(least[name], time.perf_counter() - began)
        return least

    def _train(self, training: PreferenceTraining, batch: StepBatch, scores: NDArray[np.float64]) -> float:
        """Train on a step of one pack; returns its loss."""
        pairs = batch.packs[0].pairs
        assert pairs is not None
        samples = pairs.samples.numpy()
        num_chosen = int(self._index.samples["num_chosen"][samples].sum())
        return training.train_step(batch, torch.from_numpy(scores[samples]), num_chosen).step.loss

    def _plan(self, order: Order) -> Planner:
        settings = PlanSettings(
            seed=self._task.seed,
            pack_tokens=self._task.pack_tokens,
            packs_per_step=1,
            loss_weighting="token",
            long_samples="error",
        )
        costs = shape_costs(self._task.model).integers(settings.pack_tokens, settings.pack_tiles)
        return Planner(self._index, order, settings, costs)

    def _loader(self, planner: Planner) -> Loader:
        context, padding = self._tokenizer.image_context, self._tokenizer.end_of_text
        return Loader(self._index, planner, DataLayout(1, 1), 0, 0, image_context=context, padding=padding)

    def _build(self) -> Engine:
        optim = OptimSettings(lr=self._task.lr, weight_decay=0.0)
        return Engine.build(
            partial(InternVL, self._task.model),
            _PLAN,
            self._world,
            optim=optim,
            weights=random_weights(self._task.model, self._task.seed),
            options=_OPTIONS,
        )

    def _build_model(self) -> ShardedModel:
        return ShardedModel.build_model(
            partial(InternVL, self._task.model),
            _PLAN,
            self._world,
            weights=random_weights(self._task.model, self._task.seed),
            options=_OPTIONS,
        )
