"""Storage that fails for a moment is tried again; storage that does not answer is noticed."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from wsm_megatron.errors import MergeError, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRIES = 3
FIRST_PAUSE = 0.25
"""Seconds before the first retry; every further pause is twice as long."""
STALLED_AFTER = 300.0
"""Seconds after which a single read that has not returned counts as hanging."""

_FOR_GOOD = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EBADF}
_FOR_GOOD |= {errno.EINVAL}  # an option that this file system does not have
_reading: dict[int, tuple[float, Callable[[], str]]] = {}


def patiently(read: Callable[[], T], where: Callable[[], str], retries: int = RETRIES) -> T:
    """``read()``, again after an ``OSError`` that may pass.

    Args:
        where: names checkpoint, file and position in messages.
        retries: how often it is tried again.

    Raises:
        MergeError: it failed for good. StorageError: it failed ``1 + retries`` times.
    """
    attempt, thread = 0, threading.get_ident()
    while True:
        _reading[thread] = (time.monotonic(), where)
        try:
            return read()
        except OSError as error:
            if attempt >= retries or error.errno in _FOR_GOOD:
                times = f" {attempt + 1} times" if attempt else ""
                kind = MergeError if error.errno in _FOR_GOOD else StorageError
                raise kind(f"{where()} failed{times}: {error.strerror}") from error
            logger.warning("%s failed: %s; trying again", where(), error.strerror)
        finally:
            del _reading[thread]
        time.sleep(FIRST_PAUSE * 2**attempt)
        attempt += 1


def check_storage() -> None:
    """Raise ``StorageError``, naming the place, while a read of any thread hangs."""
    now = time.monotonic()
    for since, where in list(_reading.values()):
        if now - since > STALLED_AFTER:
            raise StorageError(
                f"{where()} has not returned for {STALLED_AFTER:.0f} s: the storage hangs"
            )
