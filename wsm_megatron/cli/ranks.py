"""A command on ranks: those of its launcher, or started here; how they end."""

from __future__ import annotations

import argparse
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from wsm_megatron.cli.command import Answer, LocalLaunch, run_command
from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.comm.local_ranks import run_forked
from wsm_megatron.errors import EXIT_FAILED, MergeError
from wsm_megatron.process.signals import Stop, ending_signals
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage.retry import check_storage

logger = logging.getLogger(__name__)


def on_ranks(
    arguments: argparse.Namespace, launch: LocalLaunch, run: Callable[[Ranks], Answer]
) -> Answer:
    """The answer of ``run``, on this rank or on ranks that are started here. Signals end it."""

    def on_rank(_: argparse.Namespace) -> Answer:
        stop = Stop()
        with (
            ending_signals(stop),
            _exit_when_storage_hangs(),
            job_ranks() as ranks,
            ranks.watching(stop.check),
        ):
            return run(ranks)

    if launch.local_ranks is None:
        return on_rank(arguments)
    return Answer(status=run_forked(launch.local_ranks, partial(run_command, arguments, on_rank)))


@contextmanager
def _exit_when_storage_hangs() -> Iterator[None]:
    """End the process where the block cannot: its own thread hangs in a read."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(timeouts.exit_grace):
            try:
                check_storage()
            except MergeError as error:
                if not over.wait(
                    timeouts.exit_grace
                ):  # where only a worker hangs, the merge ends by itself
                    _say_last(f"{error}; nothing was published")
                    os._exit(EXIT_FAILED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _say_last(message: str) -> None:
    """Before the process ends without anything else."""
    logger.error(message, extra={"event": "failed", "fields": {"exit_code": EXIT_FAILED}})
    for handler in logging.getLogger("wsm_megatron").handlers:
        handler.flush()
