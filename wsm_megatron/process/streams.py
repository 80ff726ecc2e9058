"""Standard output and error, whatever they are: closed, full, or a pipe that nobody reads any more.

What cannot be printed changes no merge, and no exit status but that of a command which only shows.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from wsm_megatron.errors import EXIT_FAILED


def open_streams() -> None:
    """Put ``/dev/null`` where the process was started without input, output or error.

    Otherwise a file of a checkpoint gets the number 1 or 2, and what is printed goes into it. Call
    it before any file is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            lowest = os.open(os.devnull, os.O_RDWR)
            assert lowest == number
            os.set_inheritable(number, True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are no text in this locale
        sys.stdout.reconfigure(errors="backslashreplace")


def show(lines: Iterable[str]) -> OSError | None:
    """Print lines on standard output.

    Returns:
        why that failed; None also where the reader has had enough (``| head``).
    """
    text = "".join(f"{line}\n" for line in lines)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _silence(sys.stdout)
        return None if isinstance(error, BrokenPipeError) else error
    return None


def say(line: str) -> None:
    """Print a line on standard error. Where that fails, the exit status has to say it."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)


def say_defect() -> None:
    """Print the traceback of the exception that is being handled."""
    say(traceback.format_exc().rstrip())


def finish(status: int) -> int:
    """Print what is still to be printed; the exit status then."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            _silence(stream)
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                status = status or EXIT_FAILED
    return status


def _silence(stream: TextIO) -> None:
    """Let what a stream still holds, and what is printed from now on, go nowhere."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
