"""What a merge raises, and the exit status that ``wsm`` then has."""

from collections.abc import Sequence

EXIT_FAILED = 1
"""A merge or a check failed: a damaged checkpoint, no space, a rank lost, or a defect of this
package (with its traceback). 128 + n: signal n."""
EXIT_USAGE = 2
"""The options are wrong, or do not fit the run."""
EXIT_DOES_NOT_RESUME = 3
"""``resume-check``: plain ``--load`` does not resume from a checkpoint that is otherwise sound."""


class UsageError(ValueError):
    """The user's mistake: options or arguments that are wrong, or do not fit the run.

    The message names the option and the way out. Any other ``ValueError`` that leaves this package
    is a defect: it keeps its traceback, and work that can be continued.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class MergeError(RuntimeError):
    """A merge, a verification or a snapshot failed for a reason outside the caller's arguments.

    The message names the checkpoint, the tensor where there is one, and the way out. In a
    distributed job the same error is raised on every rank.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class PassingError(MergeError):
    """What failed may go well the next time: the same command goes on from what is finished."""


class StorageError(PassingError):
    """Storage failed or hangs."""


class LostError(PassingError):
    """A rank does not answer."""


class StoppedError(PassingError):
    """A signal has ended the work; ``number`` says which."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def exit_code(error: BaseException) -> int:
    """Exit status of ``wsm`` after an error."""
    if isinstance(error, StoppedError):
        return 128 + error.number
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def is_internal(error: BaseException) -> bool:
    """Whether an error is a defect, whose traceback belongs to its message."""
    return isinstance(error, Exception) and not isinstance(error, (UsageError, MergeError))


def mark_told(error: BaseException) -> None:
    """Say of an error that all ranks know of it, and a log says why it came up: whoever ends with
    it need not."""
    error.__dict__["_wsm_told"] = True


def is_told(error: BaseException) -> bool:
    return "_wsm_told" in error.__dict__


def printable(text: str) -> str:
    """``text`` in one line of characters that a terminal shows, and does not obey: names in it may
    come from files that are damaged or forged."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
