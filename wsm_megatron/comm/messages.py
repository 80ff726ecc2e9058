"""What ranks let each other know: that they live, or why the job has failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from wsm_megatron.errors import MergeError, StoppedError


@dataclass(frozen=True)
class Failure:
    """Why the job failed: the first rank that said so, or was found lost.

    Attributes:
        stopped_by: the signal that ended the rank; 0: none did.
    """

    rank: int
    message: str
    kind: type[Exception] = MergeError
    phase: str = ""
    stopped_by: int = 0

    def error(self) -> Exception:
        if self.stopped_by:
            return StoppedError(self.message, self.stopped_by)
        return self.kind(self.message)


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
