"""``wsm merge`` whose tensors are read, checked and summed, but not written.

    python benchmarks/unwritten.py --load RUN --save OUT [OPTIONS]

What it publishes are files of the right size and no contents.
"""

from __future__ import annotations

import os
import sys

from wsm_megatron.__main__ import run
from wsm_megatron.checkpoint.writer import CheckpointFile


class Unwritten(CheckpointFile):
    """A file that only grows."""

    def _write(self, data: memoryview, offset: int) -> None:
        self._end = max(getattr(self, "_end", 0), offset + len(data))

    def close(self) -> tuple[int, int]:
        os.ftruncate(self._descriptor, self._end)
        return super().close()


if __name__ == "__main__":
    from wsm_megatron.execution import rank

    rank.CheckpointFile = Unwritten  # type: ignore[misc]
    sys.argv[1:1] = ["merge"]
    run()
