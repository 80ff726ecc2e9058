"""``python -m tests.slurm.gated``: ``wsm``, but a job's first start waits within its first read.

It says so by the file STARTED, and waits until it is ended from outside. Started again by Slurm, it
does not wait.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from wsm_megatron.checkpoint.reader import Cover
from wsm_megatron.cli import main

_read = Cover.read


def _wait_and_read(*arguments: object) -> None:
    Path(os.environ["STARTED"]).touch()
    while True:
        time.sleep(0.1)


if __name__ == "__main__":
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
        Cover.read = _wait_and_read  # type: ignore[assignment,method-assign]
    sys.exit(main())
