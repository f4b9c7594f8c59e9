"""Indexes of made-up samples: consistent, reproducible, readable; and that reading them leaves nothing resident."""

import re
from pathlib import Path

import numpy as np
import pytest

from evovlm.data.index import Index
from evovlm.data.index_format import DETAILS, IMAGE_FILES, SAMPLE_FILES
from evovlm.data.sample import IGNORE, expand_sample
from evovlm.data.synthetic import index as synthetic
from evovlm.data.synthetic.index import write_index


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "index"
    write_index(folder, 3000, seed=1)
    return folder


def test_rows_agree_with_each_other_and_the_totals(folder: Path) -> None:
    index = Index.open(folder)
    assert [(d.name, d.kind, d.first, d.count) for d in index.datasets] == [
        ("text", "language", 0, 600),
        ("pictures", "multimodal", 600, 2400),
    ]
    wide = {name: index.samples[name].astype(np.int64) for name in index.samples.names}
    assert (wide["num_tokens"] == wide["num_stored"] + 256 * wide["num_tiles"]).all()
    assert (np.cumsum(wide["num_images"]) - wide["num_images"] == wide["first_image"]).all()
    owner = np.repeat(np.arange(3000), wide["num_images"])
    tiles = index.images["num_tiles"].astype(np.int64)
    assert (np.bincount(owner, tiles, minlength=3000) == wide["num_tiles"]).all()
    assert (tiles == index.images["cols"] * index.images["rows"] + index.images["thumbnail"]).all()
    assert tiles.max() == 13
    assert wide["num_tokens"].max() <= 16_384
    for name in ("num_tokens", "num_supervised", "num_tiles", "num_images"):
        assert getattr(index.meta, name) == wide[name].sum() == sum(getattr(d, name) for d in index.datasets)
    assert index.meta.num_images == len(index.images)


def test_samples_can_be_expanded(folder: Path) -> None:
    index = Index.open(folder)
    for sample in range(0, 3000, 7):
        expanded = expand_sample(index, sample, image_context=-5)
        assert len(expanded.tokens) == index.samples["num_tokens"][sample]
        assert (expanded.labels != IGNORE).sum() == index.samples["num_supervised"][sample] > 0
        assert (expanded.tokens == -5).sum() == 256 * index.samples["num_tiles"][sample]
        assert [ref.path.suffix for ref in expanded.refs] == [".jpg"] * index.samples["num_images"][sample]
    assert index.name(600) == "pictures/1"


def test_seed_and_chunks(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = Index.open(folder).samples["num_tokens"]
    write_index(tmp_path / "index", 3000, seed=1)
    assert (Index.open(tmp_path / "index").samples["num_tokens"] == lengths).all()
    write_index(tmp_path / "index", 3000, seed=2)
    assert (Index.open(tmp_path / "index").samples["num_tokens"] != lengths).any()
    monkeypatch.setattr(synthetic, "_CHUNK", 500)
    write_index(tmp_path / "index", 3000, seed=1)
    index = Index.open(tmp_path / "index")
    assert index.samples["line"].tolist() == [*range(1, 601), *range(1, 2401)]
    assert (np.diff(index.samples["first_image"].astype(np.int64)) == index.samples["num_images"][:-1]).all()
    with pytest.raises(ValueError, match="an index of 1 samples cannot have two datasets"):
        write_index(tmp_path / "index", 1)


def test_reading_leaves_nothing_resident(folder: Path) -> None:
    index = Index.open(folder)
    for sample in range(len(index)):
        index.tokens(sample)
        index.image_refs(sample)
        index.name(sample)
        index.dataset_of(sample)
    resident = _resident(folder)
    files = {f"{table}/{DETAILS}.bin" for table in ("samples", "images")}
    assert {file: resident[file] for file in files} == dict.fromkeys(files, 0)
    assert not {"tokens.bin", "paths.bin"} & set(resident)
    assert resident["samples/first_image.bin"] > 0, "columns are mapped, and were looked at"


def test_planning_touches_few_bytes_of_a_sample() -> None:
    """The sum that the memory of a rank is promised by (docs/data-format.md)."""
    assert sum(dtype.itemsize for name, dtype in SAMPLE_FILES.items() if name != DETAILS) == 16
    assert sum(dtype.itemsize for name, dtype in IMAGE_FILES.items() if name != DETAILS) == 1


def _resident(folder: Path) -> dict[str, int]:
    """KiB of each mapped file under a folder that are resident in this process."""
    resident: dict[str, int] = {}
    file = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
            file = str(Path(name).relative_to(folder)) if name.startswith(f"{folder}/") else None
        elif file is not None and line.startswith("Rss:"):
            resident[file] = resident.get(file, 0) + int(line.split()[1])
    return resident
