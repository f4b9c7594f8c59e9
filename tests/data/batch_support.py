"""What tests of batches share: a small real index, loaders of all ranks, the vision exchange carried out plainly."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from evovlm.data.batch import MicroBatch
from evovlm.data.build_index import IndexSettings, build_index
from evovlm.data.index import Index
from evovlm.data.loader import Loader
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.packs import Pack
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.data.tokenizer import Tokenizer
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.routes import ExchangePlan, plan_exchange
from evovlm.parallel.sequence import SequenceShards

TILE, TOKENS_PER_TILE = 28, 4
SEED = 11
T = 256
G = 8


def line(question: str, answer: str, **keys: Any) -> dict[str, Any]:
    turns = [("system", "Read."), ("human", question), ("gpt", answer)]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **keys}


def write_corpus(folder: Path) -> Path:
    """Pictures of noise in several shapes; text, single images (with JPEG degradation), several images, pretrain."""
    rng = np.random.default_rng(0)
    sizes = [(28, 28), (56, 28), (30, 90), (60, 60)]
    for i in range(12):
        width, height = sizes[i % 4]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    pretrain = {"conversations": [{"from": "pretrain", "value": "a <image> and <image>"}], "image": ["0.png", "1.png"]}
    datasets: dict[str, tuple[bool, list[dict[str, Any]]]] = {
        "text": (False, [line("How many?" * (1 + i % 3), "the answer is " + "7 " * (i % 5)) for i in range(20)]),
        "chart": (True, [line("Which?", "bar " * (1 + i % 4), image=f"{i}.png") for i in range(12)]),
        "pair": (
            False,
            [line("<image> or\n<image>?", "both", image=[f"{i}.png", f"{i + 1}.png"]) for i in range(6)] + [pretrain],
        ),
    }
    meta = {}
    for name, (augment, lines) in datasets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        meta[name] = {"root": str(folder), "annotation": str(folder / f"{name}.jsonl"), "data_augment": augment}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def open_index(folder: Path, tokenizer_dir: Path) -> Index:
    build_index(
        IndexSettings(
            meta=write_corpus(folder),
            tokenizer=tokenizer_dir,
            out=folder / "index",
            tile_size=TILE,
            tokens_per_tile=TOKENS_PER_TILE,
            max_tiles=4,
            num_workers=1,
        )
    )
    return Index.open(folder / "index")


def make_planner(index: Index, *, sequential: bool = False, **changes: Any) -> Planner:
    plain = {"seed": SEED, "pack_tokens": T, "pack_tiles": 12, "packs_per_step": G, "window": 64}
    s = PlanSettings(**(plain | changes))
    mixture = Mixture(index, MixtureSettings(language_ratio=None), SEED)
    return Planner(index, Sequential(index) if sequential else mixture, s)


def make_loader(
    index: Index,
    tokenizer: Tokenizer,
    layout: DataLayout,
    rank: int,
    encoder: int | None = None,
    planner: Planner | None = None,
    **changes: Any,
) -> Loader:
    """A loader; the encoder is the data-parallel rank of the same number unless told otherwise."""
    ids = {"image_context": tokenizer.image_context, "padding": tokenizer.end_of_text}
    planner = planner or make_planner(index)
    return Loader(index, planner, layout, rank, rank if encoder is None else encoder, **(ids | changes))


def load_ranks(
    index: Index,
    tokenizer: Tokenizer,
    layout: DataLayout,
    step: int = 0,
    planner: Planner | None = None,
    **changes: Any,
) -> tuple[StepPlan, list[StepBatch]]:
    """A step on as few ranks as have every data-parallel rank and every encoder; those of rank i are i, wrapped."""
    batches = []
    for i in range(max(layout.num_ranks, layout.encoders)):
        loader = make_loader(index, tokenizer, layout, i % layout.num_ranks, i % layout.encoders, planner, **changes)
        ((plan, batch),) = loader.steps(step, step + 1)
        batches.append(batch)
    return plan, batches


def in_order(plan: StepPlan, batches: Sequence[StepBatch]) -> list[MicroBatch]:
    """The microbatches of a step in the order of its packs."""
    packs: dict[int, MicroBatch] = {}
    for row, batch in zip(plan.assignment.tolist(), batches, strict=False):
        packs |= zip(row, batch.packs, strict=True)
    return [packs[number] for number in range(len(plan.packs))]


def load_step(
    index: Index, tokenizer: Tokenizer, layout: DataLayout, *args: Any, **changes: Any
) -> tuple[StepPlan, list[MicroBatch]]:
    """A step's plan and its microbatches in the order of its packs."""
    plan, batches = load_ranks(index, tokenizer, layout, *args, **changes)
    return plan, in_order(plan, batches)


def segments(pack: Pack, batch: MicroBatch) -> Iterator[tuple[int, int, int, int]]:
    """(sample, visit, first row, last row + 1) of each segment; padding left out."""
    borders = batch.cu_seqlens.tolist()
    for (sample, visit), (begin, end) in zip(
        zip(pack.samples.tolist(), pack.visits.tolist(), strict=True), itertools.pairwise(borders), strict=False
    ):
        yield sample, visit, begin, end


def equal(a: MicroBatch, b: MicroBatch) -> bool:
    """Whether two packs are the same; ``pairs`` field by field."""
    x, y = ({**vars(m), "pairs": None, **(vars(m.pairs) if m.pairs else {})} for m in (a, b))
    return x.keys() == y.keys() and all(
        torch.equal(x[name], y[name]) and x[name].dtype == y[name].dtype for name in x if name != "pairs"
    )


def equal_steps(a: StepBatch, b: StepBatch) -> bool:
    arrays = [
        (x, y)
        for side in ("sends", "receives")
        for x, y in zip(vars(getattr(a.routes, side)).values(), vars(getattr(b.routes, side)).values(), strict=True)
    ]
    arrays.append((a.routes.num_tiles, b.routes.num_tiles))
    return (
        all(equal(x, y) for x, y in zip(a.packs, b.packs, strict=True))
        and torch.equal(a.tiles, b.tiles)
        and torch.equal(a.tile_keys, b.tile_keys)
        and all(np.array_equal(x, y) for x, y in arrays)
    )


Use = tuple[int, int, int, int, int, int]
"""(number, encoder, slot, data-parallel rank, microbatch, row) of a tile in a pack."""


def sent(batch: StepBatch, encoder: int) -> list[Use]:
    """What an encoder says of the uses of its tiles."""
    s = batch.routes.sends
    columns = (s.number, np.full_like(s.slot, encoder), s.slot, s.dp, s.microbatch, s.row)
    assert all(column.dtype == np.int64 for column in columns)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def received(batch: StepBatch, rank: int) -> list[Use]:
    """What a data-parallel rank says of the tiles of its packs."""
    r = batch.routes.receives
    columns = (r.number, r.encoder, r.slot, np.full_like(r.slot, rank), r.microbatch, r.row)
    assert all(column.dtype == np.int64 for column in columns)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def exchange(plan: ParallelPlan, batches: Sequence[StepBatch], num_rows: int, chunk_tiles: int) -> NDArray[np.int64]:
    """Carry out the vision exchange of all ranks in one process.

    A token is told by its tile's key and its number in the tile.

    Args:
        plan: the layouts.
        batches: the batch of every rank.
        num_rows: rows of a pack.
        chunk_tiles: tiles of one encoder and chunk.

    Returns:
        int64 [dp, microbatches, num_rows, 2], (key, token) in every row, (-1, -1) where nothing arrived.
    """
    shards, tokens = SequenceShards.of(plan.llm, num_rows), batches[0].tokens_per_tile
    exchanges = [plan_exchange(b.routes, plan, rank, shards, tokens, chunk_tiles) for rank, b in enumerate(batches)]
    arrived: list[list[NDArray[np.int64]]] = [[np.empty((0, 2), np.int64)] for _ in batches]
    assert len({len(e.chunks) for e in exchanges}) == 1
    for k in range(len(exchanges[0].chunks)):
        parts = [_handed_over(batch, e, k) for batch, e in zip(batches, exchanges, strict=True)]
        for rank, e in enumerate(exchanges):
            assert [len(part[rank]) for part in parts] == e.chunks[k].recv_splits.tolist()
            arrived[rank] += [part[rank] for part in parts]
    packs = np.full((plan.llm.dp, len(batches[0].packs), num_rows, 2), -1)
    for rank, e in enumerate(exchanges):
        place, values = plan.llm.coordinates(rank), np.concatenate(arrived[rank])
        assert place.pp == 0 or len(values) == 0
        for microbatch, pack in enumerate(packs[place.dp] if place.pp == 0 else []):
            rows, sources = e.of_microbatch(microbatch)
            own = shards.rows(place)[rows]
            assert (pack[own] == -1).all()
            pack[own] = values[sources]
    return packs


def _handed_over(batch: StepBatch, e: ExchangePlan, k: int) -> list[NDArray[np.int64]]:
    """What a rank sends to each other one in a chunk."""
    chunk, tokens = e.chunks[k], batch.tokens_per_tile
    keys = batch.tile_keys.numpy()[np.array(chunk.slots, dtype=np.int64)][np.array(chunk.tiles, dtype=np.int64)]
    rows = np.stack((np.repeat(keys, tokens), np.tile(np.arange(tokens), len(keys))), axis=1)
    return np.split(rows[chunk.send_rows], np.cumsum(chunk.send_splits)[:-1])
