"""Small models of transformers, a vision-language model around one, and the same training without the engine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

# Imported on first use otherwise, by every forked rank anew.
import torch._dynamo
import torch.distributed.fsdp
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from evovlm.data.share_out import WholePack
from evovlm.engine import ModelTables
from evovlm.engine.equality import OPTIM, Trained, denominator
from evovlm.models.hf.causal import HFDecoder
from evovlm.models.hf.causal_tables import decoder_tables

V, H, T = 53, 24, 32
TILE, TOKENS_PER_TILE = 8, 4
Steps = Sequence[Sequence[WholePack]]


def make_lm(kind: str, *, tied: bool = False) -> Any:
    """A model of transformers as it comes, random; ``kind`` is such as ``Qwen3``."""
    make_config, make = {"Llama": (LlamaConfig, LlamaForCausalLM), "Qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    config = make_config(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return make(config)


def maker(kind: str, *, tied: bool = False) -> Callable[[], HFDecoder]:
    return lambda: HFDecoder(make_lm(kind, tied=tied))


def tables_of(kind: str) -> ModelTables:
    with torch.device("meta"):
        return decoder_tables(HFDecoder(make_lm(kind)))


def make_steps(*, images: bool = False, num_steps: int = 3, num_packs: int = 2) -> list[list[WholePack]]:
    """Packs of two segments and padding; positions at strides of 1 and ½; with images, in some packs only."""
    tiles = [(1, 2), (), (3,), ()]
    steps = [[(step, i) for i in range(num_packs)] for step in range(num_steps)]
    return [[_pack(10 * s + i, tiles[(s + i) % 4] if images else ()) for s, i in step] for step in steps]


def _pack(seed: int, image_tiles: tuple[int, ...]) -> WholePack:
    generator = torch.Generator().manual_seed(seed)
    borders = [0, 15 + seed % 4, 29, T]
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < 0.3] = -100
    labels[torch.tensor(borders[1:]) - 1] = -100
    labels[29:] = -100
    strides = (1.0, 0.5, 1.0)
    return WholePack(
        tokens=torch.randint(0, V, (T,), generator=generator),
        labels=labels,
        weights=torch.where(labels != -100, 0.1 + torch.rand(T, generator=generator), 0.0),
        positions=torch.cat(
            [torch.arange(b - a) * stride for (a, b), stride in zip(pairwise(borders), strides, strict=True)]
        ),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        visual_rows=torch.arange(2, 2 + TOKENS_PER_TILE * sum(image_tiles)),
        tiles=torch.randn(sum(image_tiles), 3, TILE, TILE, generator=generator),
        tile_keys=torch.zeros(sum(image_tiles), dtype=torch.int64),
        image_tiles=list(image_tiles),
    )


class ConvEncoder(nn.Module):
    """Tiles ``[N, 3, 8, 8]`` to ``[N, 4, 12]``, with a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, kernel_size=4, stride=4)
        self.mix = nn.Linear(12, 12)
        self.mean = nn.Buffer(torch.empty(3, 1, 1), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.mean.copy_(torch.tensor([0.3, 0.1, -0.2])[:, None, None])

    def forward(self, tiles: Tensor) -> Tensor:
        patches = self.patches(tiles - self.mean).flatten(2).transpose(1, 2)
        return patches + self.mix(F.gelu(patches))


class ConvQwen(nn.Module):
    """A vision-language model of somebody else: what the engine asks of it is ``see`` and ``project``."""

    def __init__(self, language: nn.Module) -> None:
        super().__init__()
        self.language = language
        self.encoder = ConvEncoder()
        self.bridge = nn.Linear(12, H)

    def see(self, tiles: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        return self.encoder(tiles)

    def project(self, features: Tensor) -> Tensor:
        return self.bridge(features)


def vision_language_tables() -> ModelTables:
    return replace(tables_of("Qwen3"), roots={"vit": "encoder", "projector": "bridge", "llm": "language"})


def embed(lm: Any, pack: WholePack) -> Tensor:
    return lm.model.embed_tokens(pack.tokens)


def embed_with_images(model: Any, pack: WholePack) -> Tensor:
    visual = model.project(model.see(pack.tiles).flatten(0, 1))
    return embed(model.language, pack).index_copy(0, pack.visual_rows, visual)


def segment_losses(lm: Any, pack: WholePack, embeddings: Tensor) -> Iterator[Tensor]:
    """Σ w·CE of each segment, by transformers alone: a batch of one sequence, its own attention and masks."""
    for a, b in pairwise(pack.cu_seqlens.tolist()):
        # A mask, or else it takes every fractional step of positions for the border of another document.
        mask = torch.ones(1, b - a, dtype=torch.int64)
        part = embeddings[None, a:b]
        output = lm(inputs_embeds=part, position_ids=pack.positions[None, a:b], attention_mask=mask, use_cache=False)
        losses = F.cross_entropy(output.logits[0], pack.labels[a:b], ignore_index=-100, reduction="none")
        yield (losses * pack.weights[a:b]).sum()


def train_plainly(model: Any, steps: Steps) -> Trained:
    """One process, PyTorch's own clipping and AdamW; ``model`` is of transformers, or has one as ``language``."""
    lm = getattr(model, "language", model)
    groups = []
    for name, parameter in model.named_parameters():
        module = "vit" if name.startswith("encoder.") else "projector" if name.startswith("bridge.") else "llm"
        rate, decay = OPTIM.lr * OPTIM.lr_scale[module], OPTIM.weight_decay if parameter.ndim > 1 else 0.0  # type: ignore[index]
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    adam = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps)
    trained = Trained([], [], [], {})
    for packs in steps:
        total = torch.zeros(())
        for pack in packs:
            embeddings = embed(lm, pack) if lm is model else embed_with_images(model, pack)
            total = total + torch.stack(list(segment_losses(lm, pack, embeddings))).sum()
        (total / denominator(packs)).backward()
        if not trained.losses:
            trained.gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
        trained.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)))
        trained.clipped.append(trained.norms[-1] > OPTIM.clip_norm)
        trained.losses.append(float(total.detach()) / denominator(packs))
        adam.step()
        adam.zero_grad()
    trained.weights.update({name: p.detach().clone() for name, p in model.named_parameters()})
    return trained
