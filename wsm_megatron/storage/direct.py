"""Reading past the page cache (``O_DIRECT``): long aligned blocks, handed out piece by piece.

For storage that outruns the page cache, and for nodes whose cache belongs to other work.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.storage.descriptors import Descriptor
from wsm_megatron.storage.files import SourceFiles
from wsm_megatron.storage.retry import RETRIES

ALIGNMENT = 4096
"""Of positions, lengths and addresses: enough for any block size in use."""
STREAMS = 2
"""Places that a thread reads in turn: a main param and its model tensor."""


@dataclass
class _Block:
    """Bytes ``start .. end`` of a file, in page-aligned memory."""

    start: int
    end: int
    memory: mmap.mmap


class DirectFiles(SourceFiles):
    """Files of a checkpoint, read with ``O_DIRECT``.

    Args:
        block: bytes of one read from storage. Each thread keeps two such blocks.

    Raises:
        UsageError: when a file is opened on a file system that has no ``O_DIRECT``.
    """

    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
    by_position = False

    def __init__(self, path: Path, retries: int = RETRIES, block: int = 4 * 2**20):
        super().__init__(path, retries)
        self._block = max(ALIGNMENT, block // ALIGNMENT * ALIGNMENT)
        self._local = threading.local()

    def read_some(self, name: str, position: int, out: memoryview, what: str) -> int:
        block = self._holding(name, position, what)
        count = max(0, min(len(out), block.end - position))
        first = position - block.start
        out[:count] = memoryview(block.memory)[first : first + count]
        return count

    def prefetch(self, name: str, position: int, length: int) -> None:
        """Nothing: what is read ahead would go to the page cache."""

    def _open(self, name: str) -> Descriptor:
        try:
            return super()._open(name)
        except MergeError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno == errno.EINVAL:
                raise UsageError(
                    f"{self.path / name}: this file system has no O_DIRECT; leave out --direct-io"
                ) from error
            raise

    def _holding(self, name: str, position: int, what: str) -> _Block:
        """The calling thread's block with a position in it; read where it has none."""
        blocks: OrderedDict[tuple[str, int], _Block]
        blocks = self._local.__dict__.setdefault("blocks", OrderedDict())
        for key, block in blocks.items():
            if key[0] == name and block.start <= position < block.end:
                blocks.move_to_end(key)
                return block
        full = len(blocks) >= STREAMS
        memory = blocks.popitem(last=False)[1].memory if full else mmap.mmap(-1, self._block)
        start = position // ALIGNMENT * ALIGNMENT
        count = super().read_some(name, start, memoryview(memory), what)
        block = blocks[name, start] = _Block(start, start + count, memory)
        return block
