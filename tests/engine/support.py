"""What the tests of the engine share: a very small model, microbatches, and training written down plainly."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

# Imported on first use otherwise, by every forked rank anew.
import torch._dynamo
import torch.distributed.checkpoint.state_dict_saver
import torch.distributed.fsdp
import torch.nn.functional as F
from torch import Tensor, nn

from evovlm.data.batch import MicroBatch
from evovlm.engine.engine import Engine
from evovlm.engine.settings import OptimSettings
from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.hf.names import model_shapes
from evovlm.models.internvl import InternVL
from evovlm.models.sharding import module_of
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

VOCAB = 37
T = 32
TILE = 8
TOKENS_PER_TILE = 4

SMALL = InternVLConfig(
    vision=VisionConfig(
        hidden_size=16, num_layers=2, num_heads=2, ffn_size=24, tile_size=TILE, patch_size=2, drop_path_rate=0.4
    ),
    decoder=DecoderConfig(
        vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24
    ),
)
"""About 10,000 parameters; drop path on."""

OPTIM = OptimSettings(lr=0.01, lr_scale={"vit": 0.5, "projector": 2.0}, weight_decay=0.1, clip_norm=1.0)

Job = Callable[[World], Any]


def weights_of(config: InternVLConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Weights under which every parameter matters: nothing is 0 or 1, layer scales are not small."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in model_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith(".bias"):
            yield name, 0.2 * noise
        elif len(shape) == 1:
            yield name, 1 + 0.2 * noise
        else:
            yield name, noise * (0.2 if "embed" in name else shape[-1] ** -0.5)


def microbatch(seed: int, num_tiles: int, *, supervised: float = 0.5) -> MicroBatch:
    """One pack of two segments and padding; fractional positions at visual rows; weights of no simple kind."""
    generator = torch.Generator().manual_seed(seed)
    borders = [0, 20, 29, T]
    labels = torch.randint(0, VOCAB, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) >= supervised] = -100
    labels[[19, 28, 29, 30, 31]] = -100
    weights = torch.where(labels != -100, 0.1 + torch.rand(T, generator=generator), 0.0)
    positions = torch.cat([torch.arange(b - a, dtype=torch.float32) for a, b in pairwise(borders)])
    rows = torch.arange(2, 2 + TOKENS_PER_TILE * num_tiles)
    positions[rows] = 1 + 0.25 * torch.arange(1, len(rows) + 1)
    return MicroBatch(
        tokens=torch.randint(0, VOCAB, (T,), generator=generator),
        labels=labels,
        weights=weights,
        positions=positions,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        tiles=torch.randn(num_tiles, 3, TILE, TILE, generator=generator),
        tile_keys=torch.randint(-(1 << 62), 1 << 62, (num_tiles,), generator=generator),
        visual_rows=rows,
    )


STEPS = [
    [microbatch(0, 0), microbatch(1, 2), microbatch(2, 0), microbatch(3, 4)],  # half the ranks have text only
    [microbatch(10 + i, 0) for i in range(4)],  # no image anywhere
    [microbatch(20, 1), microbatch(21, 0, supervised=0.0), microbatch(22, 3), microbatch(23, 2)],  # nothing to learn
]
"""Three steps of four packs each."""


def denominator(batches: Sequence[MicroBatch]) -> float:
    return sum(float(batch.weights.double().sum()) for batch in batches)


@dataclass(frozen=True)
class Trained:
    """What came out of a few steps."""

    losses: list[float]
    norms: list[float]
    clipped: list[bool]
    weights: dict[str, Tensor]


def build(
    world: World,
    config: InternVLConfig = SMALL,
    *,
    plan: ParallelPlan | None = None,
    optim: OptimSettings = OPTIM,
    weights: Iterator[tuple[str, Tensor]] | None = None,
    **options: Any,
) -> Engine:
    """Build an engine: float64 and ZeRO 3 unless told otherwise."""
    layout = Layout(dp=world.size)
    return Engine.build(
        lambda: InternVL(config),
        plan or ParallelPlan(vit=layout, projector=layout, llm=layout),
        world,
        optim=optim,
        weights=weights or weights_of(config),
        **({"precision": "float64"} | options),
    )


def run_steps(engine: Engine, steps: Sequence[Sequence[MicroBatch]] = STEPS) -> Trained:
    """Train; each rank takes every R-th pack."""
    rank, size = engine.world.rank, engine.world.size
    results = [engine.train_step(step[rank::size], denominator(step)) for step in steps]
    return Trained(
        losses=[result.loss for result in results],
        norms=[result.grad_norm for result in results],
        clipped=[result.clipped for result in results],
        weights=dict(engine.named_full_tensors()),
    )


def plain_loss(model: InternVL, batch: MicroBatch) -> Tensor:
    """Σ w·CE of a pack, with all logits at once."""
    dtype = next(model.parameters()).dtype
    logits = model(
        batch.tokens,
        batch.positions,
        batch.cu_seqlens,
        batch.tiles.to(dtype),
        batch.visual_rows,
        batch.tile_keys,
    )
    losses = F.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="none")
    return (losses * batch.weights.to(dtype)).sum()


def plain_model(config: InternVLConfig = SMALL, seed: int = 0) -> InternVL:
    model = InternVL(config).double()
    model.load_state_dict(dict(weights_of(config, seed)), strict=not config.decoder.tie_embeddings)
    return model


def train_plainly(
    config: InternVLConfig = SMALL,
    steps: Sequence[Sequence[MicroBatch]] = STEPS,
    *,
    freeze: Sequence[str] = (),
    optim: OptimSettings = OPTIM,
) -> Trained:
    """The same training in one process: no engine, no sharding, no chunks, PyTorch's plain AdamW and clipping."""
    model = plain_model(config).train()
    scale = {"vit": 0.5, "projector": 2.0, "llm": 1.0}
    groups = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module_of(name) not in freeze)
        vector = parameter.ndim == 1 or name.endswith(("class_embedding", "position_embedding"))
        decay = 0.0 if vector else optim.weight_decay
        groups.append({"params": [parameter], "lr": optim.lr * scale[module_of(name)], "weight_decay": decay})
    adam = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, foreach=False, fused=False)
    losses, norms, clipped = [], [], []
    for step in steps:
        total = sum((plain_loss(model, batch) for batch in step), torch.zeros((), dtype=torch.float64))
        (total / denominator(step)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)))
        clipped.append(norms[-1] > optim.clip_norm)
        losses.append(float(total.detach()) / denominator(step))
        adam.step()
        adam.zero_grad()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Trained(losses, norms, clipped, weights)


def assert_same_training(ours: Trained, theirs: Trained, rtol: float = 1e-10) -> None:
    """Losses, gradient norms and all weights, each relative to its size."""
    for a, b in ((ours.losses, theirs.losses), (ours.norms, theirs.norms)):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=rtol, atol=0)
    assert ours.clipped == theirs.clipped
    assert set(ours.weights) == set(theirs.weights)
    for name, weight in theirs.weights.items():
        difference = (ours.weights[name].double() - weight.double()).abs().max() / weight.abs().max()
        assert difference <= rtol, f"{name} differs by {difference:.1e}"
