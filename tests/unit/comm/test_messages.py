"""What ranks tell each other of failures: plain, bounded, and raised as the same named error."""

from __future__ import annotations

import json

import pytest

from wsm_megatron.comm.messages import MESSAGE_CHARS, TRACEBACK_CHARS, Failure, reports
from wsm_megatron.errors import (
    LostError,
    MergeError,
    PassingError,
    StoppedError,
    StorageError,
    UsageError,
)


def travelled(error: BaseException) -> Failure:
    """A failure of rank 3, as another rank reads it."""
    try:
        raise error
    except BaseException as caught:
        failure = Failure.of(caught, 3, "merging")
    assert Failure.read(failure.write()) == failure
    return failure


@pytest.mark.parametrize("kind", [UsageError, MergeError, PassingError, StorageError, LostError])
def test_an_error_has_the_same_name_on_every_rank(kind: type[Exception]) -> None:
    failure = travelled(kind("no luck"))
    assert failure.traceback == "" and failure.exception == kind.__name__
    raised = failure.error()
    assert type(raised) is kind and str(raised) == "rank 3 failed in merging: no luck"
    assert reports([failure]) == [str(raised)]


def test_a_signal_ends_every_rank_with_its_number() -> None:
    raised = travelled(StoppedError("stopped by SIGTERM", 15)).error()
    assert isinstance(raised, StoppedError) and raised.number == 15


def test_an_internal_error_takes_its_traceback_and_its_causes_along() -> None:
    error = ValueError("zip() argument 2 is shorter")
    error.__cause__ = KeyError("the cause")
    failure = travelled(error)
    assert type(failure.error()) is PassingError, "the work is kept"
    assert str(failure.error()).endswith("merging: ValueError: zip() argument 2 is shorter")
    (report,) = reports([failure])
    assert report.startswith("rank 3 failed in merging:\n") and "KeyError: 'the cause'" in report
    assert report.endswith("\nValueError: zip() argument 2 is shorter")
    assert report.count("zip() argument") == 1


def test_what_travels_is_bounded_and_text() -> None:
    failure = travelled(RuntimeError("\ud800" + 10**6 * "x"))
    assert len(failure.message) == MESSAGE_CHARS and failure.message.endswith("...")
    assert len(failure.traceback) == TRACEBACK_CHARS and failure.traceback.endswith("x\n")
    data = failure.write()
    assert len(data) < 2 * (MESSAGE_CHARS + TRACEBACK_CHARS)
    assert json.loads(data)["rank"] == 3


def test_an_error_without_a_message_has_its_name() -> None:
    assert travelled(KeyboardInterrupt()).text == "rank 3 failed in merging: KeyboardInterrupt"


def test_ranks_that_failed_alike_share_an_entry() -> None:
    alike = [Failure.of(MergeError("no space"), rank, "merging") for rank in range(100)]
    other = Failure.of(MergeError("no luck"), 100, "merging")
    assert reports([other, *alike]) == [
        "rank 100 failed in merging: no luck",
        "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more failed in merging: no space",
    ]
    assert reports([Failure.lost(7, "rank 7 is lost", "merging")]) == ["rank 7 is lost"]
