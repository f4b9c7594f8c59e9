"""Does a model fit its layouts? What must be divided by what, before anything is built."""

from evovlm.engine.settings import RunSettings
from evovlm.models.config import InternVLConfig
from evovlm.parallel.requirements import LLMShape, ModelShapes, ProjectorShape, ViTShape
from evovlm.parallel.validate import check_plan


def check_layouts(
    settings: RunSettings, config: InternVLConfig, ranks: int, *, pack_tokens: int = 0, packs_per_step: int = 0
) -> None:
    """Check that every module can be laid out as the settings say.

    Args:
        settings: Layouts, pipeline schedule, frozen modules, and what a step is made of.
        config: Shape of the model.
        ranks: Ranks of the run.
        pack_tokens: T, if it is not the settings'.
        packs_per_step: Packs of a step, if they are not the settings'.

    Raises:
        ValueError: It cannot; the message says which number must divide which, and names layouts that work.
    """
    decoder, vision, chosen = config.decoder, config.vision, settings.parallel
    shapes = ModelShapes(
        llm=LLMShape(
            num_layers=decoder.num_layers,
            num_heads=decoder.num_heads,
            num_kv_heads=decoder.num_kv_heads,
            hidden_size=decoder.hidden_size,
            ffn_size=decoder.ffn_size,
            vocab_size=decoder.vocab_size,
            pack_tokens=pack_tokens or settings.data.pack_tokens,
            packs_per_step=packs_per_step or settings.data.packs_per_step,
        ),
        vit=ViTShape(
            num_layers=vision.num_layers,
            num_heads=vision.num_heads,
            hidden_size=vision.hidden_size,
            ffn_size=vision.ffn_size,
            width_norm=vision.qk_norm,
        ),
        projector=ProjectorShape(hidden_size=decoder.hidden_size),
    )
    check_plan(
        chosen.plan(ranks),
        shapes,
        ranks,
        schedule=chosen.schedule,
        virtual_stages=chosen.virtual_stages,
        frozen=settings.model.freeze,
    )
