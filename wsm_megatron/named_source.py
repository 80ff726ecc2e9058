"""``--source PATH[:WEIGHT]``: one source by its path, wherever it lies. Pure: looks at no file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wsm_megatron.errors import UsageError
from wsm_megatron.options import local_path, number


@dataclass(frozen=True)
class NamedSource:
    """A checkpoint's folder, or a root whose tracker names one; and what it weighs, if that is
    said."""

    path: Path
    weight: float | None = None

    @classmethod
    def of(cls, text: str) -> NamedSource:
        """What follows the last colon is the weight, where it is a number.

        Raises ``UsageError`` for an address, and for a path of nothing.
        """
        path, colon, last = text.rpartition(":")
        weight = _weight(last) if colon else None
        path = text if weight is None else path
        if not path:
            raise UsageError(f"--source {text}: no path; give PATH or PATH:WEIGHT")
        return cls(local_path(path, "--source"), weight)


def named_sources(texts: Iterable[str]) -> tuple[NamedSource, ...]:
    """Sources as they were named.

    Raises ``UsageError`` where only some of them have a weight.
    """
    named = tuple(map(NamedSource.of, texts))
    without = [one.path for one in named if one.weight is None]
    if without and len(without) < len(named):
        raise UsageError(f"--source {without[0]} has no weight, and others have: weigh all or none")
    return named


def _weight(text: str) -> float | None:
    try:
        return number(text)
    except UsageError:
        return None
