"""Samples survive a killed rank and another number of ranks."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.engine.answer_store import AnswerStore


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    with AnswerStore(tmp_path) as store:
        assert "d/1" not in store
        assert store.get("d/1") is None
        store.append("d/1", {"answers": ["é\n", "…"]})
        assert store.get("d/1") == {"answers": ["é\n", "…"]}  # flushed
    with AnswerStore(tmp_path) as again:
        assert again.get("d/1") == {"answers": ["é\n", "…"]}


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (0, 0)])
def test_the_newest_line_of_a_name_counts_whichever_rank_wrote_it(tmp_path: Path, first: int, second: int) -> None:
    for rank, rule in ((first, "exact"), (second, "math"), (first, "choice")):
        with AnswerStore(tmp_path, rank) as store:
            store.append("d/1", {"rule": rule})
            assert store.get("d/1") == {"rule": rule}
            store.refresh()
            assert store.get("d/1") == {"rule": rule}
    for rank in (0, 1, 2):
        with AnswerStore(tmp_path, rank) as store:
            assert store.get("d/1") == {"rule": "choice"}


@settings(deadline=None, max_examples=30)
@given(lost=st.integers(1, 40))
def test_a_torn_line_is_cut_off(tmp_path_factory: pytest.TempPathFactory, lost: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    with AnswerStore(folder) as store:
        store.append("d/1", {"n": 1})
        store.append("d/2", {"n": "a text of some length, é"})
    file = folder / "rank-00000.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost])
    with AnswerStore(folder) as store:
        assert store.get("d/1") == {"n": 1}  # by now the torn line has been read, too
        assert "d/2" not in store
        with AnswerStore(folder, rank=1) as other:
            assert "d/2" not in other
        store.append("d/2", {"n": "a text of some length, é"})
        assert store.get("d/2") == {"n": "a text of some length, é"}
    assert file.read_bytes() == whole


def test_lines_of_other_ranks_are_seen_after_refresh(tmp_path: Path) -> None:
    with AnswerStore(tmp_path, 0) as first, AnswerStore(tmp_path, 1) as second:
        second.append("d/2", {"n": 2})
        assert "d/2" not in first
        first.refresh()
        assert first.get("d/2") == {"n": 2}


@pytest.mark.parametrize("line", ['{"id": 3}\n', "[]\n", '{"name": 3, "revision": 0}\n', '{"name": "d/1"}\n'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "rank-00000.jsonl").write_text('{"name": "d/\\"1", "revision": 0}\n' + line)
    with pytest.raises(ValueError, match=r"rank-00000.jsonl, line 2 is not a line of samples"):
        AnswerStore(tmp_path)
