"""From settings to a sharded model or an engine.

RunSettings ─► EngineOptions, ParallelPlan ─┐
ModelSource ─► shape, weights ──────────────┴─► Engine, or a frozen ShardedModel
"""

from dataclasses import replace

from evovlm.engine.engine import Engine
from evovlm.engine.model_source import ModelSource
from evovlm.engine.options import EngineOptions
from evovlm.engine.settings import ParallelSettings, RunSettings
from evovlm.engine.sharded_model import ShardedModel
from evovlm.models.internvl import InternVL
from evovlm.parallel.world import World


def engine_options(settings: RunSettings, chosen: ParallelSettings) -> EngineOptions:
    """Say how an engine of a run works, under these layouts."""
    return EngineOptions(
        precision=settings.precision,
        recompute={"vit": settings.recompute.vit, "llm": settings.recompute.llm},
        freeze=settings.model.freeze,
        schedule=chosen.schedule,
        virtual_stages=chosen.virtual_stages,
        encode_tiles=chosen.encode_tiles,
        encoder_activations=chosen.encoder_activations,
        encoder_memory=chosen.encoder_memory,
        min_unit=chosen.min_unit,
        kernels=settings.kernels,
    )


def build_engine(settings: RunSettings, source: ModelSource, world: World) -> Engine:
    """Build the engine that settings describe, filled with the source's weights. Collective."""
    return Engine.build(
        lambda: InternVL(source.config),
        settings.parallel.plan(world.size),
        world,
        optim=settings.optim,
        weights=source.weights,
        options=engine_options(settings, settings.parallel),
    )


def build_frozen(settings: RunSettings, source: ModelSource, chosen: ParallelSettings, world: World) -> ShardedModel:
    """Build a model that only runs forward, under layouts of its own. Collective."""
    options = replace(
        engine_options(settings, chosen), freeze=("vit", "projector", "llm"), schedule="1f1b", recompute=None
    )
    if chosen.virtual_stages > 1:
        options = replace(options, schedule=chosen.schedule)
    return ShardedModel.build_model(
        lambda: InternVL(source.config), chosen.plan(world.size), world, weights=source.weights, options=options
    )
