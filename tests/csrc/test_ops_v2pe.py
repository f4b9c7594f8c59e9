"""V2PE positions of whole packs: the reference segment by segment, wrong tables, the CUDA kernels' bodies on a CPU."""

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc.ops import v2pe_positions
from evovlm.models.v2pe import DELTAS, segment_positions

from .kernel_support import compile_for_host

ANY_DELTA = st.one_of(st.sampled_from(DELTAS), st.floats(0, 1, exclude_min=True))
Segment = tuple[int, list[tuple[int, int]], list[float]]


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """Length, runs inside it and their strides; runs may touch and fill the segment."""
    images = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70)), max_size=4))
    runs, done = [], 0
    for text, length in images:
        runs.append((done + text, length))
        done += text + length
    return done + draw(st.integers(0, 9)), runs, [draw(ANY_DELTA) for _ in runs]


PACKS = st.lists(segments(), max_size=5)


def tables(pack: list[Segment]) -> tuple[Tensor, Tensor, Tensor, int]:
    """``cu_seqlens``, ``runs``, ``deltas`` and the number of tokens."""
    borders, runs, deltas = [0], [], []
    for length, its_runs, its_deltas in pack:
        runs += [(borders[-1] + start, count) for start, count in its_runs]
        deltas += its_deltas
        borders.append(borders[-1] + length)
    table = torch.tensor(runs, dtype=torch.int64).view(-1, 2)
    return torch.tensor(borders, dtype=torch.int32), table, torch.tensor(deltas, dtype=torch.float64), borders[-1]


def stated(pack: list[Segment]) -> list[float]:
    return [float(p) for segment in pack for p in segment_positions(*segment)]


@settings(deadline=None)
@given(PACKS)
def test_each_segment_has_its_own_positions(pack: list[Segment]) -> None:
    positions = v2pe_positions(*tables(pack))
    assert positions.dtype == torch.float32
    assert positions.tolist() == stated(pack)  # exact, not close


@pytest.mark.parametrize("delta", [1.0, 0.25, 1 / 256, 0.3])
def test_positions_at_which_float32_ends(delta: float) -> None:
    """Beyond 2^24 the reference rounds whole numbers, and so must this."""
    pack: list[Segment] = [(2**24 + 700, [(2**24 - 100, 300)], [delta])]
    expected = torch.from_numpy(segment_positions(*pack[0]))
    assert torch.equal(v2pe_positions(*tables(pack)), expected)


def test_strided_tables() -> None:
    pack: list[Segment] = [(20, [(3, 8), (13, 4)], [0.25, 0.5]), (7, [], []), (9, [(0, 9)], [1 / 64])]
    borders, runs, deltas, num_tokens = tables(pack)
    apart = (borders.repeat_interleave(2)[::2], runs.T.contiguous().T, deltas.repeat_interleave(3)[::3])
    assert not any(x.is_contiguous() for x in apart)
    assert v2pe_positions(*apart, num_tokens).tolist() == stated(pack)


@pytest.mark.parametrize(
    ("borders", "runs", "deltas", "message"),
    [
        ([0, 10], [(2, 4), (5, 2)], [1.0, 1.0], "run 1 at row 5, length 2, does not fit its segment of rows 0 to 10"),
        ([0, 10], [(6, 2), (1, 2)], [1.0, 1.0], "run 1 at row 1"),
        ([0, 6, 10], [(4, 3)], [1.0], "run 0 at row 4, length 3, does not fit its segment of rows 0 to 6"),
        ([0, 10], [(7, -1)], [1.0], "length -1"),
        ([0, 10], [(7, 0)], [1.0], "length 0"),
        ([0, 10], [(12, 1)], [1.0], "run 0 at row 12 lies behind the last segment"),
        ([0, 10], [(7, 2)], [0.0], r"delta 0.* is not in \(0, 1\]"),
        ([0, 10], [(7, 2)], [1.5], "delta 1.5"),
        ([0, 10], [(7, 2)], [math.nan], "delta nan"),
        ([0, 10], [(7, 2)], [], "1 visual runs need as many deltas"),
        ([0, 4, 3, 10], [], [], "must rise from 0 to the 10 tokens"),
        ([1, 10], [], [], "must rise from 0"),
        ([0, 9], [], [], "to the 10 tokens"),
        ([], [], [], "cu_seqlens must be int32"),
    ],
)
def test_wrong_tables_are_refused(
    borders: list[int], runs: list[tuple[int, int]], deltas: list[float], message: str
) -> None:
    table = torch.tensor(runs, dtype=torch.int64).view(-1, 2)
    with pytest.raises(RuntimeError, match=message):
        v2pe_positions(torch.tensor(borders, dtype=torch.int32), table, torch.tensor(deltas, dtype=torch.float64), 10)


@pytest.mark.parametrize(
    ("place", "dtype", "message"),
    [
        (0, torch.int64, "cu_seqlens must be int32"),
        (1, torch.int32, "runs must be int64"),
        (2, torch.float32, "float64"),
    ],
)
def test_wrong_dtypes_are_refused(place: int, dtype: torch.dtype, message: str) -> None:
    arguments: list[Any] = list(tables([(9, [(2, 3)], [0.5])]))
    arguments[place] = arguments[place].to(dtype)
    with pytest.raises(RuntimeError, match=message):
        v2pe_positions(*arguments)


def test_registration() -> None:
    arguments = tables([(9, [(2, 3)], [0.5]), (4, [], [])])
    torch.library.opcheck(torch.ops.evovlm.v2pe_positions.default, arguments)
    compiled = torch.compile(lambda *x: v2pe_positions(*x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), v2pe_positions(*arguments) * 2)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host("host_v2pe.cpp", tmp_path_factory.mktemp("v2pe"))


def run_on_host(host: ctypes.CDLL, borders: Tensor, runs: Tensor, deltas: Tensor, num_tokens: int) -> list[float]:
    anchors = torch.full((len(runs),), -7.0, dtype=torch.float64)
    out = torch.full((num_tokens + 4,), -7.0)
    host.positions(
        ctypes.c_void_p(borders.data_ptr()),
        ctypes.c_int64(len(borders) - 1),
        ctypes.c_void_p(runs.data_ptr()),
        ctypes.c_void_p(deltas.data_ptr()),
        ctypes.c_int64(len(runs)),
        ctypes.c_void_p(anchors.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(num_tokens),
    )
    assert (out[num_tokens:] == -7).all()  # nothing behind the end
    return out[:num_tokens].tolist()


@settings(deadline=None)
@given(PACKS)
def test_cuda_kernels(host: ctypes.CDLL, pack: list[Segment]) -> None:
    assert run_on_host(host, *tables(pack)) == stated(pack)


@pytest.mark.parametrize(("start", "delta"), [(5, 0.5), (9, 1.5), (9, 0.0)])
def test_a_wrong_run_gives_no_numbers_on_cuda(host: ctypes.CDLL, start: int, delta: float) -> None:
    borders = torch.tensor([0, 12, 20], dtype=torch.int32)
    runs = torch.tensor([(2, 4), (start, 2), (14, 3)])
    got = torch.tensor(run_on_host(host, borders, runs, torch.tensor([1.0, delta, 1.0], dtype=torch.float64), 20))
    assert got[:start].tolist() == list(range(start))
    assert got[start:12].isnan().all()
    assert got[12:].tolist() == list(range(8))
