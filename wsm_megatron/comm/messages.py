"""What ranks let each other know: that they live, or why the job has failed."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from wsm_megatron.errors import (
    LostError,
    MergeError,
    PassingError,
    StoppedError,
    StorageError,
    UsageError,
    is_internal,
    some,
)

MESSAGE_CHARS, TRACEBACK_CHARS = 4 * 2**10, 16 * 2**10
"""What goes to other ranks of a message (its beginning) and of a traceback (its end) at most."""
_KINDS = (UsageError, StorageError, LostError, PassingError, MergeError)
"""What an error of one rank can be on the others, the narrower ones first."""
_RANKS_SHOWN = 8


@dataclass(frozen=True)
class Failure:
    """Why a rank failed, as the others learn of it. Travels as JSON: nobody unpickles exceptions.

    Attributes:
        rank: which failed, or was found lost.
        exception: the class of its exception, by name.
        message: of its exception; of a lost rank, who was lost and how.
        kind: what the others raise, by name.
        phase: what the rank was doing.
        traceback: of an internal error; empty for a ``UsageError`` and a ``MergeError``.
        stopped_by: the signal that ended the rank; 0: none did.
        is_lost: the rank did not say so itself.
    """

    rank: int
    exception: str
    message: str
    kind: str = MergeError.__name__
    phase: str = ""
    traceback: str = ""
    stopped_by: int = 0
    is_lost: bool = False

    @classmethod
    def of(cls, error: BaseException, rank: int, phase: str) -> Failure:
        """What a rank has to say of its own error."""
        name = type(error).__name__
        kind = next((one for one in _KINDS if isinstance(error, one)), None)
        stack = "".join(traceback.format_exception(error)) if is_internal(error) else ""
        return cls(
            rank,
            name,
            _beginning(str(error) or name, MESSAGE_CHARS),
            PassingError.__name__ if kind is None else kind.__name__,
            phase,
            _end(stack, TRACEBACK_CHARS),
            error.number if isinstance(error, StoppedError) else 0,
        )

    @classmethod
    def lost(cls, rank: int, message: str, phase: str) -> Failure:
        """What the others say of a rank that is gone."""
        name = LostError.__name__
        return cls(rank, name, message, name, phase, is_lost=True)

    @property
    def text(self) -> str:
        """One line, for ranks that did not fail themselves."""
        return self._text(f"rank {self.rank}")

    def error(self) -> Exception:
        """What the other ranks raise."""
        if self.stopped_by:
            return StoppedError(self.text, self.stopped_by)
        kinds = {one.__name__: one for one in _KINDS}
        return kinds.get(self.kind, PassingError)(self.text)

    def as_data(self) -> dict[str, Any]:
        """For ``--log-json``."""
        names = ("rank", "phase", "exception", "message", "traceback")
        return {name: value for name in names if (value := getattr(self, name)) != ""}

    def write(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, data: bytes) -> Failure:
        return cls(**json.loads(data))

    def _text(self, who: str) -> str:
        if self.is_lost:
            return self.message
        what = f"{self.exception}: {self.message}" if self.traceback else self.message
        return f"{who} failed in {self.phase}: {what}"

    def _report(self, who: str) -> str:
        if not self.traceback:
            return self._text(who)
        return f"{who} failed in {self.phase}:\n{self.traceback.rstrip()}"


def reports(failures: Iterable[Failure]) -> list[str]:
    """Why each rank failed, for a log; ranks that failed in the same way share an entry.

    An entry is one line, and of an internal error its traceback, which ends in that line.
    """
    alike: dict[str, list[Failure]] = {}
    for one in failures:
        alike.setdefault(one._report("ranks"), []).append(one)
    return [group[0]._report(_named(sorted(one.rank for one in group))) for group in alike.values()]


def _named(ranks: list[int]) -> str:
    names = some([str(rank) for rank in ranks], _RANKS_SHOWN)
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


def _beginning(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"


class Sign(NamedTuple):
    """A sign of life, and what goes along with it.

    Attributes:
        told: how many values this rank has told rank 0.
        counted: what it has done.
    """

    host: str
    pid: int
    told: int
    counted: int
    time: float

    def write(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def read(cls, sign: bytes) -> Sign:
        host, pid, told, counted, when = sign.decode().rsplit(" ", 4)
        return cls(host, int(pid), int(told), int(counted), float(when))
