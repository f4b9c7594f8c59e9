"""Memory for the tiles of steps, shared with the processes that decode them, and used again.

    file without a name   │ buffer 0: step 7 │ buffer 1: step 8 │ buffer 2: step 9 │ …     grows, never on disk
                             ▲ tensor of this process ▲ workers write through their own mappings

A buffer is free again when the last tensor (or NumPy array) that looks into it is gone, and never before: a batch that
is kept is not overwritten, it only makes one more buffer necessary. Used pages are worth keeping: the system clears
every fresh one, which takes longer than writing it. A buffer that is too small for a step gives way to a larger one.

For a CUDA device buffers are page-locked, so that copies to it need no stop. A copy may then still be under way when
its tensor is gone; the buffer is written to only after all that the current stream had been given by then is done.
"""

import mmap
import os
import sys
import weakref
from collections import deque
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 1 << 21  # bytes; a huge page


class Pinning(Protocol):
    """What page-locking needs of a device."""

    def lock(self, address: int, num_bytes: int) -> None:
        """Page-lock memory."""

    def unlock(self, address: int) -> None:
        """Undo ``lock``."""

    def mark(self) -> Any:
        """Return an object whose ``synchronize()`` waits for all that the current stream has been given so far."""


class CudaPinning:
    """Page-locks memory for one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lock(self, address: int, num_bytes: int) -> None:
        """Page-lock memory.

        Raises:
            RuntimeError: CUDA refuses.
        """
        with torch.cuda.device(self._device):
            code = int(_cudart().cudaHostRegister(address, num_bytes, 0))
        if code:
            raise RuntimeError(
                f"CUDA cannot page-lock {num_bytes / 2**20:.0f} MiB for tiles (cudaHostRegister: error {code}): "
                "raise the limit of locked memory (ulimit -l), or lower prefetch"
            )

    def unlock(self, address: int) -> None:
        """Undo ``lock``."""
        with torch.cuda.device(self._device):
            _cudart().cudaHostUnregister(address)

    def mark(self) -> torch.cuda.Event:
        """Mark the end of what the current stream has been given."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _Buffer:
    """Part of the file, mapped into this process."""

    def __init__(self, file: int, offset: int, size: int, pinning: Pinning | None) -> None:
        self.offset, self.size = offset, size
        self.mark: Any = None
        self._pinning: Pinning | None = None
        self.memory = mmap.mmap(file, size, offset=offset)
        if pinning is not None:
            pinning.lock(self.address(), size)
            self._pinning = pinning  # only now: what was not locked is not unlocked

    def address(self) -> int:
        return int(np.frombuffer(self.memory, np.uint8, 1).ctypes.data)

    def drop(self) -> None:
        """Give the pages back to the system."""
        self._unlock()
        self.memory.madvise(mmap.MADV_REMOVE)

    def wait(self) -> None:
        """Wait until the device has copied what it was told to copy."""
        mark, self.mark = self.mark, None
        if mark is not None:
            mark.synchronize()

    def _unlock(self) -> None:
        pinning, self._pinning = self._pinning, None
        if pinning is not None and not sys.is_finalizing():
            self.wait()
            pinning.unlock(self.address())

    def __del__(self) -> None:
        self._unlock()  # before the mapping goes


class TileBuffers:
    """The tile memory of one loader. ``new_tiles`` is for one thread; tensors may be dropped in any.

    Args:
        pinning: page-locks buffers; None: ordinary memory.

    Attributes:
        file: number of the open file, for ``pass_fds``.
        num_buffers: buffers there are, free or in use.
    """

    def __init__(self, pinning: Pinning | None = None) -> None:
        self.file = os.memfd_create("evovlm-tiles")
        self.num_buffers = 0
        self._pinning = pinning
        self._end = 0
        self._free: list[_Buffer] = []
        self._returned: deque[_Buffer] = deque()  # filled by whichever thread drops a tensor, which must not wait

    @property
    def num_bytes(self) -> int:
        """Memory that the buffers take: pages that have been written to."""
        return os.fstat(self.file).st_blocks * 512

    def new_tiles(self, num_tiles: int, tile_size: int) -> tuple[Tensor, int]:
        """Find room for tiles.

        Returns:
            float32 [N, 3, S, S] with whatever the memory held, and where it begins in the file, in bytes.
        """
        shape = (num_tiles, 3, tile_size, tile_size)
        if num_tiles == 0:
            return torch.empty(shape), 0
        count = num_tiles * 3 * tile_size**2
        buffer = self._take(4 * count)
        pixels: NDArray[np.float32] = np.frombuffer(buffer.memory, np.float32, count).reshape(shape)
        # torch holds this very array until the last tensor on it is gone.
        weakref.finalize(pixels, self._take_back, buffer, self._returned, self._pinning).atexit = False
        return torch.from_numpy(pixels), buffer.offset

    def close(self) -> None:
        """Close the file and let free buffers go. Tensors stay valid."""
        os.close(self.file)
        self._free.clear()
        self._returned.clear()

    @staticmethod
    def _take_back(buffer: _Buffer, returned: "deque[_Buffer]", pinning: Pinning | None) -> None:
        if pinning is not None and not sys.is_finalizing():
            buffer.mark = pinning.mark()
        returned.append(buffer)

    def _take(self, size: int) -> _Buffer:
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort(key=lambda buffer: buffer.size)
        for place, buffer in enumerate(self._free):
            if buffer.size >= size:
                del self._free[place]
                break
        else:
            if self._free:
                self._free.pop().drop()
                self.num_buffers -= 1
            buffer = self._append(size + size // 8)  # pages that no step needs take no memory
        buffer.wait()
        return buffer

    def _append(self, size: int) -> _Buffer:
        size = -(-size // _ALIGN) * _ALIGN
        os.ftruncate(self.file, self._end + size)
        buffer = _Buffer(self.file, self._end, size, self._pinning)
        self._end += size
        self.num_buffers += 1
        return buffer
