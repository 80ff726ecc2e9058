"""The ranks of a command that runs as a job: how they are started, and how they end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wsm_megatron.comm.communicator import Ranks, job_ranks
from wsm_megatron.config import JOB
from wsm_megatron.errors import EXIT_FAILED, MergeError
from wsm_megatron.options import COUNT, Options, option
from wsm_megatron.process.signals import Stop, ending_signals
from wsm_megatron.process.timeouts import timeouts
from wsm_megatron.storage.retry import check_storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalLaunch(Options):
    """How the command starts its ranks, where no launcher does."""

    local_ranks: int | None = option(
        "start N ranks on this machine, without torchrun or srun: one for each GPU, or for every "
        "16 cores",
        COUNT,
        None,
        default_text="this process alone",
        group=JOB,
    )


@contextmanager
def rank_of_command() -> Iterator[Ranks]:
    """This process as a rank of the command's job; a signal, or storage that hangs, ends it."""
    stop = Stop()
    with (
        ending_signals(stop),
        _exit_when_storage_hangs(),
        job_ranks() as ranks,
        ranks.watching(stop.check),
    ):
        yield ranks


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
