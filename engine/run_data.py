"""The data of a run: its indexes, planners and loaders, checked against the model."""

import math
from collections.abc import Mapping, Sequence

from evovlm.data.curriculum import Curriculum
from evovlm.data.index import Index
from evovlm.data.loader import Loader, LoaderSettings
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.plan import DataLayout, Planner, PlanSettings, StepPlan
from evovlm.engine.layout_check import check_layouts
from evovlm.engine.model_source import ModelSource
from evovlm.engine.settings import RunSettings
from evovlm.parallel.world import World


class RunData:
    """Training and validation data of a run. Use :func:`open_data`.

    Attributes:
        index: The training index.
        planner: Plans steps of the whole mixture.
        curriculum: Plans the run's steps: its phases, then ``planner``.
        total_steps: Optimizer steps of the run.
        plan: Layouts of the modules.
        layout: How a step's packs and images are spread over data-parallel ranks, microbatches and encoders.
    """

    def __init__(self, settings: RunSettings, source: ModelSource, world: World) -> None:
        self.settings, self.source, self.world = settings, source, world
        check_layouts(settings, source.config, world.size)
        self.plan = settings.parallel.plan(world.size)
        self.index = _open_checked(settings.data.index, source)
        self.val_index = _open_checked(settings.data.val_index, source) if settings.data.val_index else None
        self.mixture = self._mixture(settings.data.weights)
        plan_settings = PlanSettings(
            seed=settings.seed,
            pack_tokens=settings.data.pack_tokens,
            pack_tiles=settings.data.pack_tiles,
            packs_per_step=settings.data.packs_per_step,
            loss_weighting=settings.stage.weighting,
            window=settings.data.window,
        )
        self.planner = Planner(self.index, self.mixture, plan_settings)
        names = [info.name for info in self.index.datasets]
        phases = [
            (phase.steps, Planner(self.index, self._mixture(phase.over(names)), plan_settings))
            for phase in settings.data.phases
        ]
        self.curriculum = Curriculum(phases, self.planner)
        self.val_planner: Planner | None = None
        if self.val_index is not None:
            # Validation has no use for a step of G packs: one for each rank, so that little of it is padding.
            one_each = plan_settings.model_copy(update={"packs_per_step": self.plan.llm.dp})
            self.val_planner = Planner(self.val_index, Sequential(self.val_index), one_each)
        microbatches = max(1, settings.data.packs_per_step // self.plan.llm.dp)
        self.layout = DataLayout(self.plan.llm.dp, microbatches, self.plan.vit.dp)
        self.planner.check_layout(self.layout)
        self.total_steps = settings.steps or self.curriculum.phase_steps + self._steps_of(settings.epochs or 1.0)

    def _mixture(self, weights: Mapping[str, float]) -> Mixture:
        ratio = self.settings.stage.language_ratio
        mixture = MixtureSettings(
            weights=dict(weights),
            language_ratio=None if ratio == "natural" else ratio,
            replacement=self.settings.data.replacement,
        )
        return Mixture(self.index, mixture, self.settings.seed)

    def _steps_of(self, epochs: float) -> int:
        whole = self.planner.num_packs(math.ceil(epochs))
        packs = whole * epochs / math.ceil(epochs)
        return max(1, round(packs / self.settings.data.packs_per_step))

    def lengths(self, plan: StepPlan) -> Sequence[int]:
        """Return the tokens of every segment of a step."""
        counts = self.index.samples["num_tokens"]
        return [int(length) for pack in plan.packs for length in counts[pack.samples]]

    def describe(self) -> list[str]:
        """Say in lines what will be trained on, and list what is left out."""
        settings = self.settings.data
        lines = [
            f"{share.name} ({share.kind}): {share.draws:,.0f} samples per epoch, {share.passes:.2f} passes, "
            f"{share.token_share:.1%} of tokens"
            for share in self.mixture.without(self.planner.dropped).shares
        ]
        packs, ranks, microbatches = settings.packs_per_step, self.layout.num_ranks, self.layout.num_microbatches
        lines.append(
            f"{self.planner.num_packs(1):,} packs per epoch; {self.total_steps:,} steps of {packs} packs = "
            f"{ranks} data-parallel ranks × {microbatches}"
        )
        for phase in self.settings.data.phases:
            drawn = ", ".join(f"{name} {weight:g}" for name, weight in phase.weights.items() if weight)
            lines.append(f"a phase of {phase.steps:,} steps comes first, with draws in the ratio {drawn}")
        dropped = len(self.planner.dropped)
        if dropped:
            lines.append(f"{dropped:,} samples do not fit into a pack and are left out, such as:")
            lines += [f"  {line}" for line in self.planner.describe_dropped(5)]
        return lines

    def train_loader(self) -> Loader:
        """Load training steps of this rank."""
        return self._loader(self.index, self.curriculum, self.layout, augment=True)

    def validation_loader(self) -> Loader:
        """Load the held-out index once, in order.

        Raises:
            ValueError: The run has no held-out index.
        """
        if self.val_index is None or self.val_planner is None:
            raise ValueError("this run has no [data] val_index")
        layout = DataLayout(self.plan.llm.dp, 1, self.plan.vit.dp)
        return self._loader(self.val_index, self.val_planner, layout, augment=False)

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
        )


def open_data(settings: RunSettings, source: ModelSource, world: World) -> RunData:
    """Open a run's data and check it against its model and tokenizer.

    Raises:
        FileNotFoundError: There is no index.
        ValueError: A layout does not fit the model or the number of ranks; the index was made for another tokenizer,
            vocabulary or tile size; or the packs of a step cannot be shared out over the ranks.
    """
    return RunData(settings, source, world)


def _open_checked(path: object, source: ModelSource) -> Index:
    index = Index.open(str(path))
    index.check_tokenizer(source.tokenizer)
    config = source.config
    index.check_model(config.decoder.vocab_size, config.vision.tile_size, config.tokens_per_tile)
    return index
