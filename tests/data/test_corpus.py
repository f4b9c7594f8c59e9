"""Megatron's .bin/.idx corpora, written and read through megatron-core."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.corpus import check_ids, open_corpus, write_corpus
from evovlm.data.errors import MetaError


@settings(max_examples=20, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 60000), max_size=6), min_size=1, max_size=6).filter(any),
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type[np.integer]
) -> None:
    prefix = tmp_path_factory.mktemp("corpus") / "sub" / "text"
    write_corpus(prefix, documents, dtype)
    corpus = open_corpus(prefix)
    assert (len(corpus), corpus.dtype) == (len(documents), np.dtype(dtype).name)
    tokens = corpus.map_tokens()
    found = [tokens[o : o + n].tolist() for o, n in zip(corpus.offsets, corpus.lengths, strict=True)]
    assert found == documents


def test_documents_of_several_sequences_are_joined(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    for sequences in ([[1, 2], [3]], [[4]], [[5], [6, 7], [8]]):
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    corpus = open_corpus(tmp_path / "c")
    assert corpus.lengths.tolist() == [3, 1, 4]
    assert corpus.offsets.tolist() == [0, 3, 4]


def test_ids_of_another_tokenizer_are_named() -> None:
    tokens = np.array([3, 99, 7, 120], dtype=np.uint16)
    check_ids(tokens, 0, 121, "c")
    with pytest.raises(MetaError, match=r"corpus 'c': token 1003 is id 120, but the tokenizer has 100 ids \(0 to 99\)"):
        check_ids(tokens, 1000, 100, "c")
    with pytest.raises(MetaError, match=r"token 0 is id -1"):
        check_ids(np.array([-1, 5]), 0, 100, "c")


def test_damaged_corpora(tmp_path: Path) -> None:
    prefix = tmp_path / "c"
    with pytest.raises(MetaError, match=r"c\.bin' does not exist; give the path without"):
        open_corpus(prefix)
    write_corpus(prefix, [[1, 2, 3]])
    whole = (tmp_path / "c.bin").read_bytes()
    (tmp_path / "c.bin").write_bytes(whole[:-1])
    with pytest.raises(MetaError, match=r"3 tokens of 4 bytes, the \.bin holds 11 bytes"):
        open_corpus(prefix)
    (tmp_path / "c.bin").write_bytes(whole)
    (tmp_path / "c.idx").write_bytes(b"something else entirely")
    with pytest.raises(MetaError, match=r"c\.idx' is not the \.idx of a Megatron text corpus: it begins"):
        open_corpus(prefix)
    write_corpus(prefix, [[], []])
    with pytest.raises(MetaError, match="holds no tokens"):
        open_corpus(prefix)


def test_ids_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document 1: ids 5 to 70000 do not fit uint16"):
        write_corpus(tmp_path / "c", [[1], [5, 70000]], np.uint16)
