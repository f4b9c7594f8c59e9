"""Fixtures for tests of plans and batches: small indexes in memory, and a small real one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from evovlm.data.index import Index
from evovlm.data.index_format import IMAGE, SAMPLE, DatasetInfo
from evovlm.data.tokenizer import Tokenizer

TOKENS_PER_TILE = 4


@dataclass
class FakeDataset:
    """A dataset by the sizes of its samples.

    Every tile is an image of its own unless ``images`` says how many a sample has: then all but the first are one tile.
    """

    name: str
    tokens: Sequence[int]
    tiles: Sequence[int] = ()
    supervised: Sequence[int] = ()
    images: Sequence[int] = ()
    repeat_time: float = 1.0
    weight: float | None = None
    kind: Literal["language", "multimodal"] | None = None


@dataclass
class FakeIndex:
    """What planning reads of an index."""

    samples: NDArray[np.void]
    images: NDArray[np.void]
    datasets: tuple[DatasetInfo, ...]
    meta: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(tokens_per_tile=TOKENS_PER_TILE, kind="conversations")
    )

    def name(self, sample: int) -> str:
        return f"{self.datasets[int(self.samples['dataset'][sample])].name}/{int(self.samples['line'][sample])}"

    def tokens(self, sample: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        raise NotImplementedError("sizes are all that there is of this index")


def fake_index(*datasets: FakeDataset) -> FakeIndex:
    rows: list[NDArray[np.void]] = []
    infos: list[DatasetInfo] = []
    first = first_image = 0
    for number, d in enumerate(datasets):
        n = len(d.tokens)
        part = np.zeros(n, SAMPLE)
        part["dataset"], part["line"] = number, np.arange(n) + 1
        part["num_tokens"] = d.tokens
        part["num_tiles"] = d.tiles if len(d.tiles) else 0
        part["num_images"] = d.images if len(d.images) else part["num_tiles"]
        part["num_supervised"] = d.supervised if len(d.supervised) else part["num_tokens"] - 1
        part["first_image"] = first_image + np.cumsum(part["num_images"]) - part["num_images"]
        rows.append(part)
        totals = {name: int(part[name].sum()) for name in ("num_tokens", "num_supervised", "num_tiles", "num_images")}
        infos.append(
            DatasetInfo(
                name=d.name,
                kind=d.kind or ("multimodal" if len(d.tiles) else "language"),
                first=first,
                count=n,
                repeat_time=d.repeat_time,
                cut_to=None,
                augment=False,
                weight=d.weight,
                root="",
                annotation="",
                max_tiles=12,
                num_lines=n,
                num_skipped=0,
                **totals,
            )
        )
        first += n
        first_image += totals["num_images"]
    samples = np.concatenate(rows)
    return FakeIndex(samples, image_rows(samples), tuple(infos))


def image_rows(samples: NDArray[np.void]) -> NDArray[np.void]:
    """``IMAGE`` rows: the first image of a sample has the tiles that the others, one tile each, leave over."""
    some = samples[samples["num_images"] > 0]
    assert (some["num_tiles"] >= some["num_images"]).all()
    assert samples["num_tiles"].sum() == some["num_tiles"].sum(), "tiles of samples without images"
    images = np.zeros(int(some["num_images"].sum()), IMAGE)
    images["num_tiles"] = 1
    images["num_tiles"][some["first_image"]] += some["num_tiles"] - some["num_images"]
    return images


@pytest.fixture(scope="session")
def make_index() -> Callable[..., FakeIndex]:
    """Factory of indexes: ``make_index(dict(name="text", tokens=[3, 5]), …)``, keys as in ``FakeDataset``."""
    return lambda *datasets: fake_index(*(FakeDataset(**d) for d in datasets))


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    """The small tokenizer."""
    return Tokenizer.load(tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Index:
    """A real index of text, single images, and samples of several images."""
    from .batch_support import open_index  # not at the top: a test runs this file as a script

    return open_index(tmp_path_factory.mktemp("corpus"), tiny_tokenizer_dir)
