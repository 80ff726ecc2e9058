"""Ranks of a merge job: who am I, and an error on one rank is raised on all of them.

Under ``torchrun`` or ``srun`` the default process group is set up over gloo unless the caller has
one already; alone, every call here is a no-op of one rank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from wsm_megatron.errors import MergeError
from wsm_megatron.slurm import task_of_step

logger = logging.getLogger(__name__)

T = TypeVar("T")
TIMEOUT = timedelta(hours=6)
"""How long a rank waits for the slowest one at the end of a phase."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the job. Every method is collective: all ranks must call."""

    rank: int = 0
    size: int = 1

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """Run a block on every rank and leave it together.

        Raises:
            the rank's own exception where the block failed; ``ValueError`` or ``MergeError``,
            naming the rank and the phase, on every other rank.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # re-raised below, on every rank
            failure = error
        reports = self.gather((type(failure), str(failure)) if failure else None)
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report is not None:
                kind = ValueError if issubclass(report[0], ValueError) else MergeError
                raise kind(f"rank {rank} failed in {phase}: {report[1]}")

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value`` (picklable), in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, compute: Callable[[], T], phase: str) -> T:
        """``compute()`` of rank 0, on every rank; its failure too."""
        box: list[Any] = [None]
        with self.together(phase):
            if self.rank == 0:
                box[0] = compute()
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def job_ranks() -> Iterator[Ranks]:
    """The ranks of this job; sets the process group up and down where nobody has done so."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    rank, size = _launched_as()
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
    logger.info("rank %d of %d", rank, size)
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()


def _launched_as() -> tuple[int, int]:
    """Rank and world size from torchrun's variables, or from those of a Slurm step."""
    environ = os.environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"])
    task = task_of_step(environ)
    if task is None:
        return 0, 1
    environ["MASTER_ADDR"], environ["MASTER_PORT"] = task.address, str(task.port)
    return task.rank, task.size
