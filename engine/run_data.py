"""The data of a run: its indexes, planners and loaders, checked against the model."""

import math

import numpy as np
from numpy.typing import NDArray

from evovlm.data.curriculum import Curriculum
from evovlm.data.index import Index
from evovlm.data.index_format import Kind
from evovlm.data.loader import Loader, LoaderSettings
from evovlm.data.mixture import MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout
from evovlm.engine.cost_shape import run_costs
from evovlm.engine.layout_check import check_layouts
from evovlm.engine.model_source import ModelSource
from evovlm.engine.schedule import Span, make_schedule
from evovlm.engine.settings import ParallelSettings, RunSettings
from evovlm.parallel.cost import CostModel
from evovlm.parallel.world import World


class RunData:
    """Training and validation data of a run. Use :func:`open_data`.

    Attributes:
        index: The training index.
        mixture: What is drawn after all phases.
        phases: Steps and mixture of each phase.
        cost_model: What steps cost; plans balance by it.
        curriculum: Plans the run's steps.
        total_steps: Optimizer steps of the run.
        plan: Layouts of the modules.
        layout: How a step's packs and images are spread over data-parallel ranks, microbatches and encoders.
    """

    def __init__(self, settings: RunSettings, source: ModelSource, world: World) -> None:
        self.settings, self.source, self.world = settings, source, world
        check_layouts(settings, source.config, world.size)
        self.plan = settings.parallel.plan(world.size)
        kind: Kind = "preference" if settings.stage.name == "mpo" else "conversations"
        self.index = _open_checked(settings.data.index, source, kind)
        self.val_index = _open_checked(settings.data.val_index, source, kind) if settings.data.val_index else None
        plan_settings = PlanSettings(
            seed=settings.seed,
            pack_tokens=settings.data.pack_tokens,
            pack_tiles=settings.data.pack_tiles,
            packs_per_step=settings.data.packs_per_step,
            loss_weighting=settings.stage.weighting,
            window=settings.data.window,
            even_packs=settings.data.even_packs,
            balance_steps=settings.data.balance_steps,
            long_samples=settings.data.long_samples,
        )
        self.cost_model = _cost_model(settings, source)
        costs = self.cost_model.integers(settings.data.pack_tokens, settings.data.pack_tiles)
        self.mixture = MixtureSettings(
            weights=settings.data.weights,
            language_ratio=None if settings.stage.language_ratio == "natural" else settings.stage.language_ratio,
            replacement=settings.data.replacement,
        )
        self.phases = [(phase.steps, phase.mixture(self.mixture)) for phase in settings.data.phases]
        self.curriculum = Curriculum(self.index, self.phases, self.mixture, plan_settings, costs)
        self._costs = costs
        # A pass has no use for a step of G packs: one for each rank, so that little of it is padding.
        self._one_each = plan_settings.model_copy(update={"packs_per_step": self.plan.llm.dp})
        self.val_planner: Planner | None = None
        if self.val_index is not None:
            self.val_planner = Planner(self.val_index, Sequential(self.val_index), self._one_each, costs)
        microbatches = max(1, settings.data.packs_per_step // self.plan.llm.dp)
        self.layout = self._layout(microbatches)
        self.curriculum.check_layout(self.layout)
        self.total_steps = settings.steps or self.curriculum.phase_steps + self._steps_of(settings.epochs or 1.0)

    @property
    def schedule(self) -> list[Span]:
        """What is drawn from which step on, as checkpoints record it."""
        return make_schedule(self.phases, self.mixture, self.index.datasets)

    @property
    def system_prompt(self) -> str | None:
        """System turn that the training index gave to conversations without one; None: that of ``data.chat``."""
        found: str | None = self.index.meta.settings.get("system_prompt")
        return found

    def _layout(self, microbatches: int) -> DataLayout:
        vit, llm = self.plan.vit, self.plan.llm
        node_encoders = self.settings.parallel.node_ranks // (self.world.size // vit.dp)
        return DataLayout(llm.dp, microbatches, vit.dp, llm.pp, node_encoders)

    def _steps_of(self, epochs: float) -> int:
        whole = self.curriculum.last.num_packs(math.ceil(epochs))
        packs = whole * epochs / math.ceil(epochs)
        return max(1, round(packs / self.settings.data.packs_per_step))

    def under(self, chosen: ParallelSettings) -> "RunData":
        """The same steps, as other layouts of the modules share them out."""
        settings = self.settings.model_copy(update={"parallel": chosen, "steps": self.total_steps, "epochs": None})
        return RunData(settings, self.source, self.world)

    def describe(self) -> list[str]:
        """Say in lines what will be trained on, and list what is left out."""
        settings, planner = self.settings.data, self.curriculum.last
        lines = [
            f"{share.name} ({share.kind}): {share.draws:,.0f} samples per epoch, {share.passes:.2f} passes, "
            f"{share.token_share:.1%} of tokens"
            for share in planner.shares
        ]
        packs, ranks, microbatches = settings.packs_per_step, self.layout.num_ranks, self.layout.num_microbatches
        lines.append(
            f"{planner.num_packs(1):,} packs per epoch; {self.total_steps:,} steps of {packs} packs = "
            f"{ranks} data-parallel ranks × {microbatches}"
        )
        for phase in self.settings.data.phases:
            drawn = ", ".join(phase.datasets or (f"{name} × {weight:g}" for name, weight in phase.weights.items()))
            lines.append(f"a phase of {phase.steps:,} steps comes first, drawn from {drawn}")
        dropped = len(planner.dropped)
        if dropped:
            lines.append(f"{dropped:,} samples do not fit into a pack and are left out, such as:")
            lines += [f"  {line}" for line in planner.describe_dropped(5)]
        if not self.augments and any(dataset.augment for dataset in self.index.datasets):
            lines.append("data_augment is off: the reference model has scored undegraded images")
        return lines

    @property
    def augments(self) -> bool:
        """Whether images of datasets that ask for it are degraded in training."""
        settings = self.settings
        if settings.stage.name != "mpo" or not settings.stage.loss.needs_reference:
            return True
        return settings.reference.mode == "resident"  # one that has scored before has seen other pixels

    def train_loader(self) -> Loader:
        """Load training steps of this rank."""
        return self._loader(self.index, self.curriculum, self.layout, augment=self.augments)

    def pass_loader(self, index: Index, without: NDArray[np.int64]) -> Loader | None:
        """Load an index once, in order, without some samples; None where no other fits into a pack."""
        planner = Planner(index, Sequential(index, without), self._one_each, self._costs)
        if len(np.union1d(without, planner.dropped)) == len(index):
            return None
        return self._loader(index, planner, self._layout(1), augment=False)

    def validation_loader(self) -> Loader:
        """Load the held-out index once, in order.

        Raises:
            ValueError: The run has no held-out index.
        """
        if self.val_index is None or self.val_planner is None:
            raise ValueError("this run has no [data] val_index")
        return self._loader(self.val_index, self.val_planner, self._layout(1), augment=False)

    def _loader(self, index: Index, planner: Planner | Curriculum, layout: DataLayout, *, augment: bool) -> Loader:
        settings = self.settings.data
        return Loader(
            index,
            planner,
            layout,
            self.plan.llm.coordinates(self.world.rank).dp,
            self.plan.vit.coordinates(self.world.rank).dp,
            image_context=self.source.tokenizer.image_context,
            padding=self.source.tokenizer.end_of_text,
            v2pe=self.settings.stage.v2pe,
            augment=augment,
            settings=LoaderSettings(
                normalization=settings.normalize, prefetch=settings.prefetch, num_workers=settings.num_workers
            ),
            device=self.world.device,
        )


def open_data(settings: RunSettings, source: ModelSource, world: World) -> RunData:
    """Open a run's data and check it against its model and tokenizer.

    Raises:
        FileNotFoundError: There is no index.
        ValueError: A layout does not fit the model or the number of ranks; the index was made for another tokenizer,
            vocabulary or tile size; or the packs of a step cannot be shared out over the ranks.
    """
    return RunData(settings, source, world)


def _open_checked(path: object, source: ModelSource, kind: Kind) -> Index:
    index = Index.open(str(path))
    if index.meta.kind != kind:
        wanted = "preference pairs" if kind == "preference" else "conversations"
        raise ValueError(
            f"index '{path}' is of kind '{index.meta.kind}', this stage trains on {wanted}: "
            f"build one with `evovlm index --kind {kind}`"
        )
    index.check_tokenizer(source.tokenizer)
    config = source.config
    index.check_model(config.decoder.vocab_size, config.vision.tile_size, config.tokens_per_tile)
    return index


def _cost_model(settings: RunSettings, source: ModelSource) -> CostModel:
    """What steps cost: measured, or counted from the model's shape."""
    if settings.parallel.cost_model is not None:
        return CostModel.load(settings.parallel.cost_model)
    return run_costs(settings, source.config)
