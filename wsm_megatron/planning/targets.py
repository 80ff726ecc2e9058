"""The targets of a job: which of its outputs are there already, and the locks of the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from wsm_megatron.checkpoint.staging_dir import advance_tracker, leftovers, lock_path, remove
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.planning.job import Job, OutputCheckpoint
from wsm_megatron.planning.provenance import holds_merge
from wsm_megatron.planning.staging_key import merge_digest
from wsm_megatron.storage.lock import Lock
from wsm_megatron.storage.retry import watched
from wsm_megatron.storage.space import allocated, check_space

logger = logging.getLogger(__name__)


class Claims:
    """Locks of targets: of several merges with one target, one makes it. For rank 0.

    A context manager, which releases at its end what it has taken.
    """

    def __init__(self) -> None:
        self._locks: dict[Path, Lock] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for lock in self._locks.values():
            lock.release()

    def take(self, job: Job, check: Callable[[], None]) -> list[int]:
        """Lock the targets of all outputs that are not published yet; their numbers.

        Where another process makes the very same, this waits for it, and what that one has
        published is none of those any more.

        Args:
            check: called while this waits; what it raises ends the wait.

        Raises:
            UsageError: a target exists and holds something else.
            MergeError: another merge of a target is running, or there is not enough space for all.
        """
        outputs = job.outputs
        there = {k for k, output in enumerate(outputs) if _is_there(output)}
        self._check_space(job, [k for k in range(len(outputs)) if k not in there])
        # In one order, whatever the job's: no two jobs wait for each other.
        for k in sorted(range(len(outputs)), key=lambda k: str(outputs[k].path.resolve())):
            if k in there and not _is_untidy(outputs[k]):
                continue
            if self._take(job, outputs[k], check):
                there.discard(k)
            else:
                there.add(k)
        return [k for k in range(len(outputs)) if k not in there]

    def lock(self, output: OutputCheckpoint) -> Lock:
        """The lock of an output's target, which this holds."""
        return self._locks[output.path]

    def check(self) -> None:
        """Raise ``MergeError`` once one of the locks was seen to be another's. Does not wait."""
        for lock in tuple(self._locks.values()):
            lock.check(look=False)

    def _take(self, job: Job, output: OutputCheckpoint, check: Callable[[], None]) -> bool:
        """Lock a target. False where another process has published it by then, and all that one has
        left is removed.
        """
        lock = Lock(lock_path(output.path), merge_digest(job, output))
        self._locks[output.path] = lock  # released by whatever interrupts what follows
        try:
            with watched(lambda: f"{output.root}: creating"):
                output.root.mkdir(parents=True, exist_ok=True)
            lock.acquire(check)
        except OSError as error:
            raise MergeError(f"{output.path}: cannot create: {error.strerror}") from error
        if not _is_there(output):
            return True
        remove(leftovers(output.path))
        lock.release()
        del self._locks[output.path]
        return False

    def _check_space(self, job: Job, missing: list[int]) -> None:
        nbytes = job.stored_bytes()
        needed = {job.outputs[k].path: nbytes[k] for k in missing}
        check_space(needed, {path: sum(map(allocated, leftovers(path))) for path in needed})


def _is_there(output: OutputCheckpoint) -> bool:
    """Whether an output is published; where the merge that did it was killed, the tracker follows.

    Raises:
        UsageError: something else has its name.
    """
    if not os.path.lexists(output.path):
        return False
    if not holds_merge(output.path, output.provenance):
        raise UsageError(
            f"{output.path} exists and is left alone; give another --save or --output-iteration, "
            "or remove it"
        )
    logger.warning(
        "%s holds this very merge already",
        output.path,
        extra={"event": "already_there", "reported": True},
    )
    advance_tracker(output.root, output.iteration)
    return True


def _is_untidy(output: OutputCheckpoint) -> bool:
    """Whether the merge that published an output was killed over it, or is not done yet."""
    return bool(leftovers(output.path)) or lock_path(output.path).exists()
