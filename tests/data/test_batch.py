"""Microbatches of a real index: tokens, labels, weights and positions right in every row, and nothing else."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evovlm.csrc import random
from evovlm.data.batch import BatchSettings, V2PESettings, build_microbatch, run_deltas
from evovlm.data.build_index import IndexSettings, build_index
from evovlm.data.chat import expand
from evovlm.data.corpus import write_corpus
from evovlm.data.index import Index
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.packs import Pack
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.sample import read_part
from evovlm.data.step_plan import DataLayout, LossWeighting, loss_weights
from evovlm.data.tokenizer import Tokenizer
from evovlm.models.v2pe import DELTAS, segment_positions

from .batch_support import SEED, TOKENS_PER_TILE, T, load_step, make_planner, segments


def test_shapes_and_dtypes(index: Index, tokenizer: Tokenizer) -> None:
    plan, batches = load_step(index, tokenizer, DataLayout(2, 4))
    for pack, batch in zip(plan.packs, batches, strict=True):
        n = pack.num_tiles
        assert batch.pairs is None
        assert {
            name: (value.dtype, tuple(value.shape))
            for name, value in vars(batch).items()
            if name not in ("cu_seqlens", "pairs")
        } == {
            "prefixes": (torch.int32, (0, 4)),
            "tokens": (torch.int64, (T,)),
            "labels": (torch.int64, (T,)),
            "weights": (torch.float32, (T,)),
            "positions": (torch.float32, (T,)),
            "visual_rows": (torch.int64, (n * TOKENS_PER_TILE,)),
        }


def test_rows_of_every_segment(index: Index, tokenizer: Tokenizer) -> None:
    """Tokens, borders and padding; every supervised token is a label once, in the row before it, and nowhere else."""
    for step in range(3):
        plan, batches = load_step(index, tokenizer, DataLayout(4, 2), step)
        for pack, batch in zip(plan.packs, batches, strict=True):
            lengths = index.samples["num_tokens"][pack.samples]
            ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
            assert batch.cu_seqlens.tolist() == ends + ([T] if ends[-1] < T else [])
            for sample, _, begin, end in segments(pack, batch):
                refs = index.image_refs(sample)
                ids, supervised = expand(
                    *index.tokens(sample),
                    [ref.insert_at for ref in refs],
                    [ref.num_tiles * TOKENS_PER_TILE for ref in refs],
                    tokenizer.image_context,
                )
                assert batch.tokens[begin:end].tolist() == ids.tolist()
                labels = batch.labels[begin:end].tolist()
                assert labels[-1] == -100  # the next token belongs to another sample
                expected = [int(i) if s else -100 for i, s in zip(ids[1:], supervised[1:], strict=True)]
                assert labels[:-1] == expected
            assert (batch.tokens[ends[-1] :] == tokenizer.end_of_text).all()
            assert (batch.labels[ends[-1] :] == -100).all()
            assert int((batch.labels != -100).sum()) == index.samples["num_supervised"][pack.samples].sum()
            assert ((batch.weights > 0) == (batch.labels != -100)).all()


def test_visual_rows_are_those_of_image_context(index: Index, tokenizer: Tokenizer) -> None:
    plan, batches = load_step(index, tokenizer, DataLayout(2, 4))
    assert plan.num_tiles > 0
    for batch in batches:
        visual = batch.tokens == tokenizer.image_context
        assert batch.visual_rows.tolist() == visual.nonzero().flatten().tolist()


@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
def test_weights_sum_to_the_denominator(index: Index, tokenizer: Tokenizer, weighting: LossWeighting) -> None:
    planner = make_planner(index, loss_weighting=weighting)
    for layout in (DataLayout(1, 8), DataLayout(4, 2)):
        plan, batches = load_step(index, tokenizer, layout, 1, planner)
        total = sum(batch.weights.double().sum().item() for batch in batches)
        assert total == pytest.approx(plan.loss_denominator, rel=1e-6)
        for pack, batch in zip(plan.packs, batches, strict=True):
            for sample, _, begin, end in segments(pack, batch):
                n = int(index.samples["num_supervised"][sample])
                weights = batch.weights[begin:end]
                each = {"token": 1.0, "sample": 1 / n, "square": n**-0.5}[weighting]
                assert weights[weights > 0].tolist() == pytest.approx([each] * n)
                assert each == pytest.approx(float(loss_weights(n, weighting)))


def test_positions_follow_v2pe(index: Index, tokenizer: Tokenizer) -> None:
    drawn: Counter[float] = Counter()
    for v2pe in (V2PESettings(), V2PESettings(mode="fixed", delta=0.125), V2PESettings(mode="random")):
        plan, batches = load_step(index, tokenizer, DataLayout(2, 4), v2pe=v2pe)
        for pack, batch in zip(plan.packs, batches, strict=True):
            for sample, visit, begin, end in segments(pack, batch):
                runs, shift = [], 0
                for ref in index.image_refs(sample):
                    runs.append((ref.insert_at + shift, ref.num_tiles * TOKENS_PER_TILE))
                    shift += runs[-1][1]
                if v2pe.mode == "random":
                    keys = [random.key("v2pe", SEED, sample, visit, image) for image in range(len(runs))]
                    deltas = [DELTAS[int(random.choice_index(np.array(k, np.uint64), 9))] for k in keys]
                    drawn.update(deltas)
                else:
                    deltas = [1.0 if v2pe.mode == "off" else 0.125] * len(runs)
                positions = batch.positions[begin:end]
                assert positions.tolist() == segment_positions(end - begin, runs, deltas).tolist()
                if v2pe.mode == "off":
                    assert positions.tolist() == list(range(end - begin))
            padding = batch.positions[pack.num_tokens :]
            assert padding.tolist() == list(range(len(padding)))
    assert len(drawn) >= 5


def test_random_strides_differ_between_visits_and_images() -> None:
    deltas = [run_deltas(V2PESettings(mode="random"), 0, 5, visit, 200) for visit in range(2)]
    assert set(deltas[0]) == set(DELTAS)
    assert deltas[0] != deltas[1]


def a_pack(lengths: list[int], samples: list[int], begins: list[int] | None = None) -> Pack:
    columns = (samples, [0] * len(samples), begins or [0] * len(samples), lengths)
    return Pack(*(np.array(column, np.int64) for column in columns), sum(lengths), 0)


def test_parts_of_a_text_join_to_the_whole(index: Index, tokenizer: Tokenizer) -> None:
    """Tokens and targets of the parts are those of the sample; the last row's target is the next part's first token."""
    s = BatchSettings(SEED, T, "square", tokenizer.image_context, tokenizer.end_of_text, V2PESettings(), True)
    sample = next(i for i in range(20) if index.samples["num_supervised"][i] > 8)
    length = int(index.samples["num_tokens"][sample])
    whole = build_microbatch(index, a_pack([length], [sample]), s)
    cut = length - 5
    parts = build_microbatch(index, a_pack([length - cut, cut], [sample, sample], [cut, 0]), s)
    assert torch.equal(
        torch.cat([parts.tokens[length - cut : length], parts.tokens[: length - cut]]), whole.tokens[:length]
    )
    assert torch.equal(
        torch.cat([parts.labels[length - cut : length], parts.labels[: length - cut]]), whole.labels[:length]
    )
    assert parts.positions[:length].tolist() == [*range(length - cut), *range(cut)]
    for begin, end in ((0, length - cut), (length - cut, length)):
        targets = parts.labels[begin:end] != -100
        n = int(targets.sum())
        assert parts.weights[begin:end][targets].tolist() == pytest.approx([n**-0.5] * n)


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_token_of_a_long_document_is_a_target_once(
    tmp_path: Path, tokenizer: Tokenizer, tiny_tokenizer_dir: Path, shuffled: bool
) -> None:
    """Documents of a corpus, some longer than a pack: all tokens but the first of each, from its left neighbour."""
    rng = np.random.default_rng(2)
    lengths = [5, T - 1, T, T + 1, 2 * T, 2 * T + 1, 3 * T + 7, 10 * T - 1, 2]
    documents = [rng.integers(0, tokenizer.vocab_size, length).tolist() for length in lengths]
    write_corpus(tmp_path / "books", documents, np.uint16)
    (tmp_path / "meta.json").write_text('{"books": {"annotation": "books", "format": "megatron"}}')
    out = tmp_path / "index"
    build_index(IndexSettings(meta=tmp_path / "meta.json", tokenizer=tiny_tokenizer_dir, out=out, num_workers=1))
    index = Index.open(out)
    plan_settings = PlanSettings(
        seed=SEED, pack_tokens=T, packs_per_step=4, window=4, loss_weighting="token", long_samples="split"
    )
    order = Mixture(index, MixtureSettings(), SEED) if shuffled else Sequential(index)
    planner = Planner(index, order, plan_settings)
    s = BatchSettings(SEED, T, "token", tokenizer.image_context, tokenizer.end_of_text, V2PESettings(), True)
    targets: list[tuple[int, int]] = []
    num_packs = planner.num_packs(1)
    for step in range(-(-num_packs // 4)):
        plan = planner.plan_step(step, DataLayout(2, 2))
        batches = [build_microbatch(index, pack, s) for pack in plan.packs]
        assert sum(batch.weights.sum().item() for batch in batches) == plan.loss_denominator == plan.num_supervised
        for pack, batch in list(zip(plan.packs, batches, strict=True))[: num_packs - 4 * step]:
            found = dict(zip(batch.cu_seqlens.tolist(), zip(pack.samples, pack.begins, strict=True), strict=False))
            for row in (batch.labels != -100).nonzero().flatten().tolist():
                border = max(begin for begin in found if begin <= row)
                document, place = int(found[border][0]), int(found[border][1]) + row - border
                assert batch.tokens[row].item() == documents[document][place]
                assert batch.labels[row].item() == documents[document][place + 1]
                assert batch.positions[row].item() == row - border
                targets.append((document, place + 1))
    assert sorted(targets) == [(d, t) for d, length in enumerate(lengths) for t in range(1, length)]


def test_an_index_that_does_not_fit_its_tokens_is_an_error(index: Index, tokenizer: Tokenizer) -> None:
    broken: Any = Index.open(index.path)
    broken.samples = {name: index.samples[name].copy() for name in index.samples.names}
    broken.samples["num_supervised"][3] += 1
    tokens = [int(n) for n in index.samples["num_tokens"]]
    s = BatchSettings(SEED, T, "square", tokenizer.image_context, tokenizer.end_of_text, V2PESettings(), True)
    with pytest.raises(ValueError, match=r"sample 'text/4' has (\d+) targets, but the index says"):
        build_microbatch(broken, a_pack([tokens[3]], [3]), s)
    with pytest.raises(ValueError, match=r"sample 'text/\d+' ends at token \d+ of a pack of 256"):
        build_microbatch(index, a_pack(tokens[:20], [*range(20)]), s)
    for begin, length in ((1, tokens[3] - 1 + 1), (tokens[3] - 2, 3)):
        with pytest.raises(
            ValueError, match=rf"sample 'text/4': tokens {begin} to {begin + length} .* {tokens[3]} tokens"
        ):
            read_part(index, 3, begin, length)
    pictured = next(i for i in range(len(index)) if index.samples["num_images"][i])
    with pytest.raises(ValueError, match=r"as a part of a text, but it has \d+ images"):
        read_part(index, pictured, 0, 2)
