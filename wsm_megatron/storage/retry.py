"""Storage that fails for a moment is tried again; storage that does not answer is noticed."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from wsm_megatron.errors import MergeError, StorageError
from wsm_megatron.process.timeouts import timeouts

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRIES = 3

_FOR_GOOD = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EBADF}
_FOR_GOOD |= {errno.ELOOP, errno.ENAMETOOLONG}
_FOR_GOOD |= {errno.EINVAL}  # an option that this file system does not have
_pending: dict[object, tuple[float, Callable[[], str]]] = {}


@contextmanager
def watched(where: Callable[[], str]) -> Iterator[None]:
    """Let :func:`check_storage` notice when the block, a call to storage, does not return.

    Args:
        where: names file and call in the message.
    """
    call = object()
    _pending[call] = (time.monotonic(), where)
    try:
        yield
    finally:
        del _pending[call]


def with_retries(read: Callable[[], T], where: Callable[[], str], retries: int = RETRIES) -> T:
    """``read()``, again after an ``OSError`` that may pass.

    Args:
        where: names checkpoint, file and position in messages.
        retries: how often it is tried again.

    Raises:
        MergeError: it failed for good. StorageError: it failed ``1 + retries`` times.
    """
    attempt = 0
    while True:
        try:
            with watched(where):
                return read()
        except OSError as error:
            if attempt >= retries or error.errno in _FOR_GOOD:
                times = f" {attempt + 1} times" if attempt else ""
                kind = MergeError if error.errno in _FOR_GOOD else StorageError
                raise kind(f"{where()} failed{times}: {error.strerror}") from error
            logger.warning(
                "%s failed: %s; trying again", where(), error.strerror, extra={"event": "retried"}
            )
        time.sleep(timeouts.first_pause * 2**attempt)
        attempt += 1


def check_storage() -> None:
    """Raise ``StorageError``, naming the place, while a call of any thread hangs."""
    now = time.monotonic()
    for since, where in list(_pending.values()):
        if now - since > timeouts.stalled_after:
            raise StorageError(
                f"{where()} has not returned for {timeouts.stalled_after:.0f} s: the storage hangs"
            )
