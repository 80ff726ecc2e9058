"""``python -m tests.slurm.gated``: ``wsm``, but a job's first start stops writing in the middle.

Each rank says by the file STARTED.RANK that the third part of its file is on disk, and in its
journal, and waits until it is ended from outside. Started again by Slurm, it does not wait.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from wsm_megatron.__main__ import run
from wsm_megatron.storage.journal import Journal

PARTS = 3
_add = Journal.add
_added = itertools.count(1)


def _add_and_wait(journal: Journal, *part: object) -> None:
    _add(journal, *part)  # type: ignore[arg-type]
    if next(_added) >= PARTS:
        journal.sync()
        Path(f"{os.environ['STARTED']}.{os.environ['SLURM_PROCID']}").touch()
        while True:
            time.sleep(0.1)


if __name__ == "__main__":
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
        Journal.add = _add_and_wait  # type: ignore[assignment,method-assign]
    run()
