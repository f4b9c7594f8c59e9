"""The measurement of an index: keys of the report, numbers that make sense, an error for too few samples."""

import mmap
from pathlib import Path

import pytest

from evovlm.data.synthetic.index import write_index
from evovlm.launch.bench_index import Memory, _use, measure_index, rows


def test_a_small_index(tmp_path: Path) -> None:
    measured = measure_index(tmp_path / "index", 4000, num_steps=3)
    assert (measured["samples"], measured["images"]) == (4000, write_index(tmp_path / "again", 4000).num_images)
    assert set(measured) == {
        "samples",
        "images",
        "write_s",
        "open_s",
        "first_plan_s",
        "count_epoch_s",
        "plan_step_ms",
        "read_us",
        "peak_rss_mb",
        *(f"{when}_{what}_mb" for when in ("open", "plan", "read") for what in ("rss", "private")),
    }
    # Pages are counted in batches, so that memory that did not change may seem to, a little.
    assert -2 < measured["open_rss_mb"] < measured["plan_rss_mb"] + 2 < measured["peak_rss_mb"] + 4
    assert measured["plan_private_mb"] < measured["plan_rss_mb"]
    assert dict(rows(measured))["samples, images"] == f"4,000, {measured['images']:,}"


def test_too_few_samples_are_an_error(tmp_path: Path) -> None:
    write_index(tmp_path / "index", 500)
    with pytest.raises(ValueError, match=r"500 samples make \d+ steps, 100 are wanted: take more samples"):
        _use(tmp_path / "index", 100)


def test_memory_sees_what_is_allocated() -> None:
    before = Memory.now()
    block = mmap.mmap(
        -1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # of its own: an array might find its place in what was freed
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    after = Memory.now()
    assert after.private - before.private > 60 << 20
    assert after.peak >= after.rss > before.rss
