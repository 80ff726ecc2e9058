"""A progress bar on rank 0: bytes, GB/s, time left. Quiet where nobody watches a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from wsm_megatron.engine.run import Progress

_LOG_SECONDS = 30.0


@contextmanager
def progress_bar(rank: int, total: int) -> Iterator[Progress]:
    """Show ``total`` bytes going by; in a log file one line every half minute instead of a bar."""
    watched = sys.stderr.isatty()
    interval = 0.1 if watched else _LOG_SECONDS
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="merging",
        disable=rank != 0,
        delay=0.0 if watched else interval,
        mininterval=interval,
        maxinterval=2 * interval,
        leave=watched,
    ) as bar:

        def update(nbytes: int) -> None:
            bar.update(nbytes)

        yield update
