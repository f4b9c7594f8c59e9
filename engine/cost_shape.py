"""Costs of a model from its shape: FLOPs of what a step computes, for every tile, visual token, row and squared token.

    InternVLConfig ─ forward_flops ─► forward of one tile, row, … ─ × passes ─► CostModel(unit = "flops")

A pass is what one forward costs: a trained module takes 3, a frozen one that hands gradients on 2, one behind which
nothing is trained 1 (:func:`evovlm.engine.flops.training_flops`); recomputation adds the forwards that it repeats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evovlm.data.index_format import IndexMeta
from evovlm.engine.flops import Flops, forward_flops, training_flops
from evovlm.engine.recompute import Recompute
from evovlm.engine.settings import RunSettings
from evovlm.engine.vision import Activations
from evovlm.models.config import InternVLConfig
from evovlm.parallel.cost import CostModel


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs of a model, taken apart; all are whole numbers.

    Attributes:
        per_tile: Of the ViT.
        per_visual_token: Of the projector.
        per_token: Of the decoder's layers, for each row.
        per_square: Of causal attention over all layers, for each squared token of a segment.
        per_target: Of the output head, for each supervised row.
    """

    per_tile: float
    per_visual_token: float
    per_token: float
    per_square: float
    per_target: float

    @classmethod
    def of(cls, config: InternVLConfig) -> "ForwardFlops":
        """Take the count of a pack apart, which is linear in each of these."""
        tile = forward_flops(config, 1, (), 0)
        one, two = (forward_flops(config, 0, (length,), 0).llm for length in (1, 2))
        per_square = (two - 2 * one) / 2  # a + b and 2a + 4b
        return cls(
            per_tile=tile.vit,
            per_visual_token=tile.projector / config.tokens_per_tile,
            per_token=one - per_square,
            per_square=per_square,
            per_target=forward_flops(config, 0, (), 1).llm,
        )


def shape_costs(
    config: InternVLConfig,
    *,
    freeze: Sequence[str] = (),
    recompute: Mapping[str, Recompute] | None = None,
    encoder_activations: Activations = "auto",
) -> CostModel:
    """Count what a forward and backward cost.

    Args:
        config: Shape of the model.
        freeze: Modules that are not trained.
        recompute: Module → activation checkpointing; only ``full`` repeats what is counted.
        encoder_activations: ``recompute`` encodes each chunk twice; ``auto`` counts as keeping.
    """
    forward = ForwardFlops.of(config)
    passes = training_flops(Flops(1.0, 1.0, 1.0), freeze)
    recompute = recompute or {}

    def repeated(module: str, module_passes: float) -> float:
        return float(recompute.get(module, "none") == "full" and module_passes > 1)

    again = float(encoder_activations == "recompute" and not {"vit", "projector"} <= set(freeze))
    layers = passes.llm + repeated("llm", passes.llm)
    return CostModel.from_shape(
        per_tile=forward.per_tile * (passes.vit + repeated("vit", passes.vit) + again),
        per_visual_token=forward.per_visual_token * (passes.projector + again),
        per_token=forward.per_token * layers,
        per_square=forward.per_square * layers,
        per_target=forward.per_target * passes.llm,
    )


def run_costs(settings: RunSettings, config: InternVLConfig) -> CostModel:
    """Count what a forward and backward of a run cost; see :func:`shape_costs`."""
    return shape_costs(
        config,
        freeze=settings.model.freeze,
        recompute=settings.recompute.model_dump(),
        encoder_activations=settings.parallel.encoder_activations,
    )


def supervised_share(meta: IndexMeta) -> float:
    """Share of an index's tokens that are targets."""
    return meta.num_supervised / max(1, meta.num_tokens)
