"""Tile memory: used again when nothing looks into it, never before; it grows by replacing; pinning is undone."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from evovlm.data.tile_buffers import CudaPinning, TileBuffers

S = 64
TILE_BYTES = 12 * S * S


@pytest.fixture
def buffers() -> Iterator[TileBuffers]:
    made = TileBuffers()
    yield made
    made.close()


def test_tiles_are_float32_in_the_file(buffers: TileBuffers) -> None:
    tiles, offset = buffers.new_tiles(3, S)
    other, other_offset = buffers.new_tiles(2, S)
    assert (tiles.shape, tiles.dtype) == ((3, 3, S, S), torch.float32)
    tiles[:], other[:] = 1.0, 2.0
    with open(buffers.file, "rb", closefd=False) as file:
        for begin, count, value in ((offset, 3, 1.0), (other_offset, 2, 2.0)):
            file.seek(begin)
            found = np.frombuffer(file.read(count * TILE_BYTES), np.float32)
            np.testing.assert_array_equal(found, np.full(count * 3 * S * S, value, np.float32))


def test_no_tiles_take_no_buffer(buffers: TileBuffers) -> None:
    tiles, _ = buffers.new_tiles(0, S)
    assert tiles.shape == (0, 3, S, S)
    assert buffers.num_buffers == 0


def test_a_dropped_buffer_is_used_again(buffers: TileBuffers) -> None:
    offsets = set()
    for number in (5, 3, 5, 4):
        tiles, offset = buffers.new_tiles(number, S)
        offsets.add(offset)
        del tiles
    assert len(offsets) == buffers.num_buffers == 1


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda tiles: tiles,
    "slice": lambda tiles: tiles[1:2],
    "transposed": lambda tiles: tiles.permute(3, 0, 1, 2),
    "array": lambda tiles: tiles.numpy()[1:2],
    "detached": lambda tiles: tiles.detach().view(-1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_still_looked_at_is_not_overwritten(buffers: TileBuffers, view: str) -> None:
    tiles, offset = buffers.new_tiles(3, S)
    tiles[:] = 7.0
    held = VIEWS[view](tiles)
    del tiles
    for _ in range(3):
        other, other_offset = buffers.new_tiles(3, S)
        other[:] = 1.0
        assert other_offset != offset
        del other
    assert (held == 7.0).all()
    assert buffers.num_buffers == 2
    del held
    kept = [buffers.new_tiles(3, S) for _ in range(2)]
    assert {where for _, where in kept} >= {offset}
    assert buffers.num_buffers == 2


def test_a_buffer_can_be_dropped_by_another_thread(buffers: TileBuffers) -> None:
    holder = [buffers.new_tiles(2, S)[0]]
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    buffers.new_tiles(2, S)
    assert buffers.num_buffers == 1


def test_a_larger_step_replaces_a_buffer_and_its_memory(buffers: TileBuffers) -> None:
    for number in (100, 150, 300):
        tiles, _ = buffers.new_tiles(number, S)
        tiles[:] = 1.0
        assert number * TILE_BYTES <= buffers.num_bytes <= number * TILE_BYTES + (1 << 20)
        del tiles
    assert buffers.num_buffers == 1


def test_tensors_outlive_the_buffers() -> None:
    made = TileBuffers()
    tiles, _ = made.new_tiles(2, S)
    tiles[:] = 3.0
    made.close()
    del made
    assert (tiles == 3.0).all()


class Mark:
    """Stands for a point in the work of a device."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def synchronize(self) -> None:
        self._log.append("wait")


class FakePinning:
    """Notes what is asked of a device, and that locks and unlocks pair."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.locked: dict[int, int] = {}

    def lock(self, address: int, num_bytes: int) -> None:
        assert address not in self.locked
        self.locked[address] = num_bytes
        self.log.append("lock")

    def unlock(self, address: int) -> None:
        del self.locked[address]
        self.log.append("unlock")

    def mark(self) -> Mark:
        self.log.append("mark")
        return Mark(self.log)


def test_a_pinned_buffer_is_locked_once_and_waits_for_copies() -> None:
    pinning = FakePinning()
    made = TileBuffers(pinning)
    tiles, _ = made.new_tiles(2, S)
    assert pinning.locked[tiles.data_ptr()] >= 2 * TILE_BYTES
    del tiles
    assert pinning.log == ["lock", "mark"]
    tiles, _ = made.new_tiles(1, S)
    assert pinning.log == ["lock", "mark", "wait"]  # before anybody writes
    del tiles
    tiles, _ = made.new_tiles(1000, S)
    assert pinning.log[3:] == ["mark", "wait", "unlock", "lock"]  # the pages of a copy under way are not given back
    made.close()
    del made
    assert len(pinning.locked) == 1
    del tiles
    assert pinning.log[7:] == ["mark", "wait", "unlock"]
    assert pinning.locked == {}


def test_memory_that_cannot_be_locked_is_not_unlocked() -> None:
    class Refuses(FakePinning):
        def lock(self, address: int, num_bytes: int) -> None:
            raise RuntimeError("no")

    pinning = Refuses()
    made = TileBuffers(pinning)
    with pytest.raises(RuntimeError, match="no"):
        made.new_tiles(2, S)
    assert pinning.log == []
    made.close()


@pytest.mark.gpu
def test_cuda_locks_pages_and_copies_without_waiting() -> None:
    device = torch.device("cuda", 0)
    made = TileBuffers(CudaPinning(device))
    copies = []
    for value in range(4):  # the buffer is used again while copies may be under way
        tiles, _ = made.new_tiles(20, 448)
        assert tiles.is_pinned()
        tiles[:] = float(value)
        copies.append(tiles.to(device, non_blocking=True))
        del tiles
    assert made.num_buffers == 1
    assert [copy.unique().tolist() for copy in copies] == [[0.0], [1.0], [2.0], [3.0]]
    made.close()
