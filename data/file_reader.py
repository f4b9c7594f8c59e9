"""Reads single stretches of a large file; unlike a mapping, what was read does not stay in the process' memory.

read(begin, num_bytes) ──► bytes        one system call; threads and forked processes may share a reader
"""

import os
import weakref
from pathlib import Path

from evovlm.data.index_format import REBUILD, IndexMismatchError


class FileReader:
    """An open file to read stretches of; closed when the last reference to it goes.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, begin: int, num_bytes: int) -> bytes:
        """Return ``num_bytes`` bytes from byte ``begin`` on.

        Raises:
            IndexMismatchError: the file ends before.
        """
        found = os.pread(self._descriptor, num_bytes, begin)
        if len(found) != num_bytes:
            raise IndexMismatchError(
                f"'{self.file}' was cut off: {num_bytes} bytes wanted from byte {begin} on, found {len(found)}: "
                f"restore it or {REBUILD}"
            )
        return found
