"""Fixtures for tests of the plan: small indexes in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from evovlm.data.index_format import SAMPLE, DatasetInfo

TOKENS_PER_TILE = 4


@dataclass
class FakeDataset:
    """A dataset by the sizes of its samples; every tile is an image of its own unless ``images`` says otherwise."""

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
    datasets: tuple[DatasetInfo, ...]
    meta: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(tokens_per_tile=TOKENS_PER_TILE))

    def name(self, sample: int) -> str:
        row = self.samples[sample]
        return f"{self.datasets[int(row['dataset'])].name}/{int(row['line'])}"


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
    return FakeIndex(np.concatenate(rows), tuple(infos))


@pytest.fixture(scope="session")
def make_index() -> Callable[..., FakeIndex]:
    """Factory of indexes: ``make_index(dict(name="text", tokens=[3, 5]), …)``, keys as in ``FakeDataset``."""
    return lambda *datasets: fake_index(*(FakeDataset(**d) for d in datasets))
