"""Reading whole records from a pack's files, past the mapping.

Knows: files, offsets, checksums at the first reading. Does not know: where the bytes are kept
(`offload.host_tier`, `offload.disk_tier`), nor which are wanted.

A mapping is read a fault at a time, where one read of a whole record keeps a disk busy: docs/log.md
compares them.
"""

from __future__ import annotations

import contextlib
import os

from torch import Tensor

from quant.pack import Pack, as_buffer


class RecordFiles:
    """The records of a pack as its files have them. For use by several threads at once."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._checked = [bytearray(layer.num_experts) for layer in pack.info.layers]

    def size(self, layer: int) -> int:
        return self._pack.info.layout_of(layer).record_bytes

    def read(self, layer: int, expert: int, into: Tensor, *, cached: bool = True) -> None:
        """Read a record into `into` [>= record_bytes] uint8. Raises `PackError`, `OSError`.

        With `cached` False the system need not keep the bytes as well: the caller does.
        """
        path, begin = self._pack.place(layer, expert)
        target = into[: self.size(layer)]
        view, done = as_buffer(target), 0
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(f"{path} ends at byte {begin + done}")
                done += count
            if not cached and hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):  # advice
                    os.posix_fadvise(file.fileno(), begin, done, os.POSIX_FADV_DONTNEED)
        self.check(layer, expert, target)

    def check(self, layer: int, expert: int, record: Tensor) -> None:
        """Compare a record with its checksum, the first time. Raises `PackError`."""
        if not self._checked[layer][expert]:
            self._pack.check_record(layer, expert, record)
            self._checked[layer][expert] = 1
