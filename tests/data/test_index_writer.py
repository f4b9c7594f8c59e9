"""Writing an index chunk after chunk: what is read is what was written, however it was cut into chunks."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evovlm.data.errors import MetaError
from evovlm.data.index import Index
from evovlm.data.index_format import (
    FORMAT_VERSION,
    IMAGE,
    IMAGE_FILES,
    SAMPLE,
    DatasetInfo,
    IndexMeta,
    Kind,
    TokenSource,
    sample_dtype,
    sample_files,
)
from evovlm.data.index_writer import Chunk, IndexWriter, Skip, Totals

COUNTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=12)
"""Stored tokens and images of each sample."""
KINDS = st.sampled_from(get_args(Kind))


def whole(counts: Sequence[tuple[int, int]], seed: int = 0, kind: Kind = "conversations") -> Chunk:
    """All samples as one chunk: every field has a value of its own, as large as its file allows."""
    rng = np.random.default_rng(seed)
    samples = _random_rows(sample_dtype(kind), len(counts), sample_files(kind), rng)
    samples["num_stored"], samples["num_images"] = np.array(counts).T
    samples["token_offset"] = np.cumsum(samples["num_stored"]) - samples["num_stored"]
    samples["first_image"] = np.cumsum(samples["num_images"]) - samples["num_images"]
    images = _random_rows(IMAGE, int(samples["num_images"].sum()), IMAGE_FILES, rng)
    paths = [f"p{'ä' * (number % 3)}{number}.png".encode() for number in range(len(images))]
    images["path_length"] = [len(path) for path in paths]
    images["path_offset"] = np.cumsum(images["path_length"]) - images["path_length"]
    ids = rng.integers(-(2**31), 2**31, int(samples["num_stored"].sum()), dtype=np.int32)
    return Chunk(len(samples), samples, images, ids, b"".join(paths))


def _random_rows(
    dtype: np.dtype[np.void], count: int, files: dict[str, np.dtype[np.void]], rng: np.random.Generator
) -> NDArray[np.void]:
    stored = {name: part for file in files for name, part in _fields(file, files[file]).items()}
    assert sorted(stored) == sorted(dtype.names or ()), "every field has a place in a file"
    rows = np.zeros(count, dtype)
    for name, kind in stored.items():
        most = 1 if kind.kind == "b" else min(np.iinfo(kind).max, np.iinfo(dtype[name]).max)
        rows[name] = rng.integers(0, most, count, endpoint=True)
    return rows


def _fields(file: str, dtype: np.dtype[np.void]) -> dict[str, np.dtype[np.void]]:
    return {name: dtype[name] for name in dtype.names} if dtype.names else {file: dtype}


def cut(chunk: Chunk, borders: Sequence[int]) -> list[Chunk]:
    """The same samples as several chunks, each with offsets from its own start."""
    images = np.append(chunk.samples["first_image"], len(chunk.images))
    tokens = np.append(chunk.samples["token_offset"], len(chunk.tokens))
    paths = np.append(chunk.images["path_offset"], len(chunk.paths))
    parts = []
    for begin, end in pairwise([0, *sorted(borders), len(chunk.samples)]):
        samples = chunk.samples[begin:end].copy()
        rows = chunk.images[images[begin] : images[end]].copy()
        first_path, last_path = paths[images[begin]], paths[images[end]]
        samples["first_image"] -= images[begin]
        samples["token_offset"] -= tokens[begin]
        rows["path_offset"] -= first_path
        ids = chunk.tokens[tokens[begin] : tokens[end]]
        parts.append(Chunk(end - begin, samples, rows, ids, chunk.paths[first_path:last_path]))
    return parts


def write(folder: Path, chunks: Sequence[Chunk], kind: Kind = "conversations") -> Path:
    """An index of one dataset, number 3 of source 0."""
    with IndexWriter(folder, kind) as writer:
        totals = Totals()
        for chunk in chunks:
            writer.append(chunk, dataset=3, dataset_name="d", source=0)
            totals.add(chunk)
        writer.finish(describe(writer, totals, kind))
    return folder


def describe(writer: IndexWriter, totals: Totals, kind: Kind) -> IndexMeta:
    info = DatasetInfo(
        name="d",
        kind="multimodal",
        first=0,
        count=totals.num_samples,
        repeat_time=1,
        cut_to=None,
        augment=False,
        weight=None,
        root="/root",
        annotation="d.jsonl",
        max_tiles=12,
        num_lines=totals.num_lines,
        num_skipped=totals.num_skipped,
        num_tokens=totals.num_tokens,
        num_supervised=totals.num_supervised,
        num_tiles=totals.num_tiles,
        num_images=totals.num_images,
    )
    return IndexMeta(
        format_version=FORMAT_VERSION,
        kind=kind,
        tokenizer_fingerprint="",
        vocab_size=10,
        tile_size=28,
        tokens_per_tile=4,
        min_tiles=1,
        max_tiles=12,
        thumbnail=True,
        datasets=(info,),
        sources=(TokenSource(path="tokens.bin", dtype="int32", num_bytes=4 * writer.num_tokens, own=True),),
        num_samples=writer.num_samples,
        num_images=writer.num_images,
        num_tokens=totals.num_tokens,
        num_supervised=totals.num_supervised,
        num_tiles=totals.num_tiles,
        path_bytes=writer.path_bytes,
        skipped={},
        warnings=(),
        files=(),
        settings={},
        settings_hash="",
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(counts=COUNTS, kind=KINDS, data=st.data())
def test_the_bytes_do_not_depend_on_chunks(
    tmp_path_factory: pytest.TempPathFactory, counts: list[tuple[int, int]], kind: Kind, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    chunk = whole(counts, kind=kind)
    borders = data.draw(st.lists(st.integers(0, len(counts)), max_size=6), label="chunk borders")
    one, many = write(folder / "one", [chunk], kind), write(folder / "many", cut(chunk, borders), kind)
    assert files_of(one) == files_of(many)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(counts=COUNTS, kind=KINDS, data=st.data())
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, counts: list[tuple[int, int]], kind: Kind, data: st.DataObject
) -> None:
    chunk = whole(counts, seed=len(counts), kind=kind)
    borders = data.draw(st.lists(st.integers(0, len(counts)), max_size=3), label="chunk borders")
    index = Index.open(write(tmp_path_factory.mktemp("writer") / "index", cut(chunk, borders), kind))
    assert index.meta.kind == kind
    chunk.samples["dataset"], chunk.samples["token_source"] = 3, 0
    for table, rows in ((index.samples, chunk.samples), (index.images, chunk.images)):
        assert len(table) == len(rows)
        assert sorted(table.names) == sorted(rows.dtype.names or ())
        for name in table.names:
            np.testing.assert_array_equal(table[name], rows[name])

    for sample, row in enumerate(chunk.samples):
        stored = chunk.tokens[row["token_offset"] :][: row["num_stored"]]
        ids, supervised = index.tokens(sample)
        assert (ids.dtype, supervised.dtype) == (np.int32, np.bool_)
        assert supervised.tolist() == (stored >= 0).tolist()
        assert ids.tolist() == np.where(stored >= 0, stored, ~stored).tolist()
        refs = index.image_refs(sample)
        assert len(refs) == row["num_images"]
        for ref, image in zip(refs, chunk.images[row["first_image"] :], strict=False):
            name = chunk.paths[image["path_offset"] :][: image["path_length"]]
            assert ref.path == Path("/root") / os.fsdecode(name)
            for field in ("frame", "cols", "rows", "thumbnail", "num_tiles", "insert_at"):
                assert getattr(ref, field) == image[field]
                assert isinstance(getattr(ref, field), int)


def test_an_index_without_images(tmp_path: Path) -> None:
    index = Index.open(write(tmp_path / "index", cut(whole([(2, 0), (3, 0)]), [1])))
    assert (len(index), len(index.images), index.image_refs(1)) == (2, 0, [])
    assert index.images["num_tiles"].tolist() == index.images["cols"].tolist() == []


def test_skips_are_listed(tmp_path: Path) -> None:
    chunk = Chunk(2, np.zeros(1, SAMPLE), tokens=np.zeros(1, np.int32), skips=(Skip(7, "x", "too long", "ä"),))
    text = (write(tmp_path / "index", [chunk]) / "skipped.jsonl").read_text(encoding="utf-8")
    assert text == '{"dataset": "d", "line": 7, "id": "x", "reason": "too long", "detail": "ä"}\n'


@pytest.mark.parametrize(
    ("table", "field", "most"),
    [("samples", "num_tiles", 32767), ("samples", "num_images", 32767), ("images", "cols", 255)],
)
def test_a_number_that_does_not_fit_is_an_error(tmp_path: Path, table: str, field: str, most: int) -> None:
    chunk = whole([(2, 0), (1, 2), (4, 0), (1, 0), (1, 1)])
    chunk.samples["line"] = [5, 6, 7, 8, 9]
    row = 2 if table == "images" else 4  # the third image is the fifth sample's
    rows = getattr(chunk, table)
    rows[field][row] = most
    write(tmp_path / "fits", [chunk])
    rows[field][row] = most + 1
    with pytest.raises(MetaError, match=rf"sample 'd/9' has {field} = {most + 1}, but an index holds at most {most}"):
        write(tmp_path / "large", [chunk])
    assert not (tmp_path / "large").exists()


def test_more_images_than_rows_can_count_is_an_error(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "index") as writer:
        writer.num_images = 2**32 - 1
        rows = np.zeros(2, SAMPLE)
        rows["first_image"], rows["line"] = [0, 1], [1, 2]
        with pytest.raises(MetaError, match=r"sample 'd/2' has first_image = 4294967296, but .* at most 4294967295"):
            writer.append(Chunk(2, rows), dataset=0, dataset_name="d", source=0)
