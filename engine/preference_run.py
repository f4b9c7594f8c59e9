"""The reference model of a run of preference optimisation: hashed, scored or built, as ``[reference]`` says.

policy weights ─ hashed as they are read ─► engine ─┬─ precompute: scores the index before any step, if no file does
from_dir ─ hashed ─► a frozen model ────────────────┴─ resident: stays
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from evovlm.data.index import Index
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import StepPlan
from evovlm.engine.build import build_frozen
from evovlm.engine.engine import Engine
from evovlm.engine.model_source import ModelSource, open_source
from evovlm.engine.preference_steps import PreferenceSteps
from evovlm.engine.reference import NoReference, PrecomputedReference, Reference, ResidentReference
from evovlm.engine.reference_pass import WeightsDigest, default_cache, index_digest, score_index
from evovlm.engine.run_data import RunData
from evovlm.engine.settings import ModelSettings, RunSettings
from evovlm.engine.sharded_model import ShardedModel
from evovlm.engine.stages import MPOStage
from evovlm.parallel.world import World


class PreferenceRun:
    """What a run of stage ``mpo`` needs besides its engine.

    Args:
        settings: The run, of stage ``mpo``.
        data: Its data.
        world: The ranks.

    Attributes:
        identity: What a resumed run must share: which reference model. Known after :meth:`steps`.
    """

    def __init__(self, settings: RunSettings, data: RunData, world: World) -> None:
        assert isinstance(settings.stage, MPOStage)
        self._settings, self._loss, self._data, self._world = settings, settings.stage.loss, data, world
        self._digest = WeightsDigest(enabled=world.is_main)
        self.identity: dict[str, Any] = {}

    def watch(self, source: ModelSource) -> ModelSource:
        """Hash the policy's weights while the engine reads them, if they are the reference's, too."""
        if not self._loss.needs_reference or self._settings.reference.from_dir is not None:
            return source
        return replace(source, weights=self._digest.watch(source.weights))

    def steps(self, engine: Engine) -> PreferenceSteps:
        """Make the reference ready; the engine holds the weights that the run starts from. Collective.

        Raises:
            ValueError: Scores are of another model or other data, or the reference has another vocabulary.
        """
        if not self._loss.needs_reference:
            return PreferenceSteps(engine, self._loss, NoReference(), NoReference())
        if self._settings.reference.mode == "resident":
            model = self._frozen()
            self.identity = {"weights": self._digest.share(self._world)}
            return PreferenceSteps(engine, self._loss, *self._resident(model))
        if self._settings.reference.from_dir is None:
            make_model: Callable[[], ShardedModel] = lambda: engine  # noqa: E731
        else:
            source = self._source()
            if self._world.is_main:  # who alone hashes; others need not read it only for the name of its scores
                for _ in self._digest.watch(source.weights):
                    pass
            make_model = cache(self._frozen)
        self.identity = {"weights": self._digest.share(self._world)}
        index, val_index = self._data.index, self._data.val_index
        return PreferenceSteps(
            engine,
            self._loss,
            self._scores(index, make_model, self._settings.reference.cache),
            None if val_index is None else self._scores(val_index, make_model, None),
        )

    def _scores(self, index: Index, make_model: Callable[[], ShardedModel], file: Path | None) -> Reference:
        """Scores of an index, from a file or a pass over it."""
        settings = self._settings
        identity = {
            **self.identity,
            "index": index_digest(index, self._world),
            "v2pe": settings.stage.v2pe.model_dump(mode="json"),
            "normalize": settings.data.normalize,
            "precision": settings.precision,
        }
        table = score_index(
            make_model,
            index,
            file or default_cache(index, identity),
            identity,
            lambda known: self._data.pass_loader(index, known),
            self._world,
            self._say,
        )
        return PrecomputedReference(index, table)

    def _resident(self, model: ShardedModel) -> tuple[Reference, Reference | None]:
        """Scores of training steps, as they come, and of held-out pairs, made once: they drop no paths."""
        chosen = self._settings.reference.parallel
        data = self._data if chosen is None else self._data.under(chosen)

        def batches(step: int) -> Iterator[tuple[StepPlan, StepBatch]]:
            return data.train_loader().steps(step, data.total_steps)

        training = ResidentReference(model, None if chosen is None else batches)
        index = data.val_index
        if index is None:
            return training, None
        table = score_index(
            lambda: model, index, None, {}, lambda known: data.pass_loader(index, known), self._world, self._say
        )
        return training, PrecomputedReference(index, table)

    def _frozen(self) -> ShardedModel:
        chosen = self._settings.reference.parallel or self._settings.parallel
        return build_frozen(self._settings, self._digested(self._source()), chosen, self._world)

    def _source(self) -> ModelSource:
        """The reference model, with the policy's tokenizer and drop path.

        Raises:
            ValueError: It is of another shape than the index was made for.
        """
        model, directory = self._settings.model, self._settings.reference.from_dir
        if directory is None:
            return open_source(model, self._settings.seed)
        wanted = self._data.source
        source = open_source(
            ModelSettings(from_dir=directory, tokenizer=wanted.tokenizer_dir, drop_path=model.drop_path),
            self._settings.seed,
        )
        here, there = source.config, wanted.config
        if (here.tokens_per_tile, here.vision.tile_size) != (there.tokens_per_tile, there.vision.tile_size):
            raise ValueError(
                f"the reference model {directory} makes {here.tokens_per_tile} tokens of tiles of "
                f"{here.vision.tile_size} pixels, the policy {there.tokens_per_tile} of {there.vision.tile_size}: both "
                "must read the same index"
            )
        return source

    def _digested(self, source: ModelSource) -> ModelSource:
        """Hash what a resident model reads; the policy's own weights are hashed already."""
        hashes = self._settings.reference.mode == "resident" and self._settings.reference.from_dir is not None
        return replace(source, weights=self._digest.watch(source.weights)) if hashes else source

    def _say(self, line: str) -> None:
        if self._world.is_main:
            Console().print(line, markup=False, highlight=False, soft_wrap=True)
