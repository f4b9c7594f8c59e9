"""Does a layout train the same model? A small model, a few steps, and the same training in one process written plainly.

    make_steps ─┬─► train_alone   one process: no engine, no sharding, no chunks, PyTorch's own loss, clipping and AdamW
                └─► train_under   the engine, under a plan, on this run's ranks
    compare: the largest difference of losses, of each parameter's gradient, of weights after the last step

``evovlm verify`` and the project's tests stand on this.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evovlm.data.share_out import WholePack, share_out
from evovlm.engine.engine import Engine, StepResult
from evovlm.engine.options import EngineOptions
from evovlm.engine.settings import DTYPES, OptimSettings, Precision
from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.hf.names import model_shapes
from evovlm.models.internvl import InternVL
from evovlm.models.sharding import module_of
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.world import World

Step = Sequence[WholePack]
OPTIM = OptimSettings(
    lr=0.01, lr_scale={"vit": 0.5, "projector": 2.0, "llm": 1.0}, weight_decay=0.1, clip_norm=1.0, eps=1e-4
)
"""Every module at its own rate. A large ε: an update of Adam is not continuous where a gradient is about 0."""
SMALL = InternVLConfig(
    vision=VisionConfig(
        hidden_size=16, num_layers=2, num_heads=4, ffn_size=24, tile_size=8, patch_size=2, drop_path_rate=0.4
    ),
    decoder=DecoderConfig(
        vocab_size=45, hidden_size=32, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=4, ffn_size=48
    ),
)
"""About 40,000 parameters; drop path on; a vocabulary that no number of ranks divides."""


@dataclass(frozen=True)
class Trained:
    """What came out of a few steps.

    Attributes:
        losses: Of each step.
        norms: Gradient norm of each step, before clipping.
        clipped: Whether each step's gradient was scaled down.
        gradients: Of the first step, by parameter; empty where not asked for.
        weights: After the last step.
    """

    losses: list[float]
    norms: list[float]
    clipped: list[bool]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """The largest relative differences of two trainings: of tensors, relative to their largest element."""

    loss: float
    gradient: float
    weight: float

    @property
    def largest(self) -> float:
        """The largest of the three."""
        return max(self.loss, self.gradient, self.weight)


def make_weights(config: InternVLConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Float64 weights under which every parameter matters: nothing is 0 or 1, layer scales are not small."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in model_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith(".bias"):
            yield name, 0.2 * noise
        elif len(shape) == 1:
            yield name, 1 + 0.2 * noise
        else:
            yield name, noise * (0.2 if "embed" in name else shape[-1] ** -0.5)


def make_pack(
    config: InternVLConfig,
    borders: Sequence[int],
    seed: int,
    image_tiles: Sequence[int],
    *,
    supervised: float = 0.5,
) -> WholePack:
    """Make one pack of random tokens; fractional positions at visual rows; loss weights of no simple kind.

    Args:
        config: Shape of the model.
        borders: Segment borders, from 0 to T; the last segment is padding.
        seed: Of everything random.
        image_tiles: Tiles of each image; visual rows begin at row 2 and follow one another.
        supervised: Share of rows that have a target.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_tiles = borders[-1], sum(image_tiles)
    vocab, tile = config.decoder.vocab_size, config.vision.tile_size
    labels = torch.randint(0, vocab, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) >= supervised] = -100
    labels[torch.tensor(borders[1:]) - 1] = -100
    labels[borders[-2] :] = -100
    weights = torch.where(labels != -100, 0.1 + torch.rand(num_rows, generator=generator), 0.0)
    positions = torch.cat([torch.arange(b - a, dtype=torch.float32) for a, b in pairwise(borders)])
    rows = torch.arange(2, 2 + config.tokens_per_tile * num_tiles)
    positions[rows] = 1 + 0.25 * torch.arange(1, len(rows) + 1)
    return WholePack(
        tokens=torch.randint(0, vocab, (num_rows,), generator=generator),
        labels=labels,
        weights=weights,
        positions=positions,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        visual_rows=rows,
        tiles=torch.randn(num_tiles, 3, tile, tile, generator=generator),
        tile_keys=torch.randint(-(1 << 62), 1 << 62, (num_tiles,), generator=generator),
        image_tiles=list(image_tiles),
    )


def make_steps(config: InternVLConfig = SMALL, *, num_packs: int = 4, num_rows: int = 64) -> list[list[WholePack]]:
    """Three steps: images in some packs only, images nowhere, and one giant image beside a pack without targets."""
    images = [(), (1, 2), (), (4, 1), (2, 1), (), (3, 3), (1,)]
    borders = [[0, 41, 57, num_rows], [0, 30, 31, 60, num_rows], [0, num_rows - 1, num_rows]]

    def step(number: int, tiles: Sequence[Sequence[int]]) -> list[WholePack]:
        return [
            make_pack(
                config,
                borders[(number + i) % 3],
                100 * number + i,
                tiles[i % len(tiles)],
                supervised=0.0 if number == 2 and i == 1 else 0.5,
            )
            for i in range(num_packs)
        ]

    giant = (num_rows // 2 - 2) // config.tokens_per_tile
    return [step(0, images), step(1, [()]), step(2, [(giant,), (), (), (), (), (), (), ()])]


def denominator(packs: Step) -> float:
    """Sum the loss weights of a step."""
    return sum(float(pack.weights.double().sum()) for pack in packs)


def plain_loss(model: InternVL, pack: WholePack) -> Tensor:
    """Σ w·CE of a pack, with all logits at once."""
    dtype = next(model.parameters()).dtype
    logits = model(pack.tokens, pack.positions, pack.cu_seqlens, pack.tiles.to(dtype), pack.visual_rows, pack.tile_keys)
    losses = F.cross_entropy(logits, pack.labels, ignore_index=-100, reduction="none")
    return (losses * pack.weights.to(dtype)).sum()


def plain_model(config: InternVLConfig = SMALL, seed: int = 0, precision: Precision = "float64") -> InternVL:
    """Build the model in one process, filled with :func:`make_weights`."""
    model = InternVL(config).to(DTYPES[precision].master)
    model.load_state_dict(dict(make_weights(config, seed)), strict=not config.decoder.tie_embeddings)
    return model


def train_alone(
    config: InternVLConfig = SMALL,
    steps: Sequence[Step] | None = None,
    *,
    freeze: Sequence[str] = (),
    optim: OptimSettings = OPTIM,
    precision: Precision = "float64",
) -> Trained:
    """Train in one process, without the engine."""

    def loss(model: InternVL, packs: Step) -> Tensor:
        total = sum((plain_loss(model, pack) for pack in packs), torch.zeros((), dtype=torch.float64))
        return total / denominator(packs)

    return train_plainly(config, steps or make_steps(config), loss, freeze=freeze, optim=optim, precision=precision)


S = TypeVar("S")


def train_plainly(
    config: InternVLConfig,
    steps: Sequence[S],
    loss_of: Callable[[InternVL, S], Tensor],
    *,
    freeze: Sequence[str],
    optim: OptimSettings,
    precision: Precision,
) -> Trained:
    """Train in one process: a loss of each step, autograd, PyTorch's own clipping and AdamW."""
    model = plain_model(config, precision=precision).train()
    groups = []
    for name, parameter in model.named_parameters():
        module = module_of(name)
        parameter.requires_grad_(module not in freeze)
        vector = parameter.ndim == 1 or name.endswith(("class_embedding", "position_embedding"))
        rate = optim.lr * {str(key): value for key, value in optim.lr_scale.items()}.get(module, 1.0)
        groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.0 if vector else optim.weight_decay})
    adam = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, foreach=False, fused=False)
    trained = Trained([], [], [], {})
    for step in steps:
        loss = loss_of(model, step)
        torch.autograd.backward(loss)
        if not trained.losses:
            named = model.named_parameters()
            trained.gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        trained.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)))
        trained.clipped.append(trained.norms[-1] > optim.clip_norm)
        trained.losses.append(float(loss.detach()))
        adam.step()
        adam.zero_grad()
    trained.weights.update({name: p.detach().clone() for name, p in model.named_parameters()})
    return trained


def train_under(
    plan: ParallelPlan,
    world: World,
    options: EngineOptions,
    config: InternVLConfig = SMALL,
    steps: Sequence[Step] | None = None,
    *,
    optim: OptimSettings = OPTIM,
) -> Trained:
    """Train with the engine under a plan; tensors come out on rank 0. Collective."""
    engine = Engine.build(
        lambda: InternVL(config), plan, world, optim=optim, weights=make_weights(config), options=options
    )

    def backward(packs: Step) -> float:
        return engine.backward(share_out(packs, plan, world.rank, config.tokens_per_tile), denominator(packs))

    return run_engine(engine, steps or make_steps(config), backward)


def run_engine(engine: Engine, steps: Sequence[S], backward: Callable[[S], float]) -> Trained:
    """Train with an engine, given what computes loss and gradients of a step. Collective."""
    gradients: dict[str, Tensor] = {}
    results: list[StepResult] = []
    for step in steps:
        loss = backward(step)
        if not results:
            gradients.update(engine.named_full_gradients())
        results.append(engine.apply(loss))
    return Trained(
        losses=[result.loss for result in results],
        norms=[result.grad_norm for result in results],
        clipped=[result.clipped for result in results],
        weights=dict(engine.named_full_tensors()),
        gradients=gradients,
    )


def compare(ours: Trained, theirs: Trained) -> Difference:
    """Compare two trainings; a parameter that only one of them has is a difference of infinity."""

    def tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        if set(a) != set(b):
            return float("inf")
        differences = []
        for name, value in b.items():
            scale = value.double().abs().max()
            differences.append(float((a[name].double() - value.double()).abs().max() / (scale if scale > 0 else 1.0)))
        return max(differences, default=0.0)

    numbers = zip((*ours.losses, *ours.norms), (*theirs.losses, *theirs.norms), strict=True)
    return Difference(
        loss=max(abs(a - b) / (abs(b) or 1.0) for a, b in numbers) if ours.clipped == theirs.clipped else float("inf"),
        gradient=tensors(ours.gradients, theirs.gradients),
        weight=tensors(ours.weights, theirs.weights),
    )


def tied(config: InternVLConfig = SMALL) -> InternVLConfig:
    """The same shape with the head tied to the embedding."""
    return replace(config, decoder=replace(config.decoder, tie_embeddings=True))
