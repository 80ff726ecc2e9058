"""What is typed for an option, as a value: whole numbers, weights, sizes, paths.

Everything here raises ``UsageError`` with a message that shows what would be understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from wsm_megatron.errors import UsageError

T = TypeVar("T")

_NUMBER = r"([+-]?[0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,3})?)"
_COUNT = re.compile(_NUMBER + r"\s*([kmbt]?)", re.IGNORECASE)
_SIZE = re.compile(_NUMBER + r"\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""``s3://bucket/run``; of two slashes, ``pathlib`` leaves one."""
_LARGEST = 2**63


def count(text: str) -> int:
    """A whole number: 20000, 20_000, 20k, 500M, 1e9, 2.5B (of tokens: billions)."""
    found = _COUNT.fullmatch(text.strip())
    value = Fraction("0.5")
    if found is not None:
        value = _fraction(found[1]) * 1000 ** " kmbt".index(found[2].lower() or " ")
    if value.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number such as 20000, 20k, 500M, 1e9 or 2.5B")
    if abs(value) >= _LARGEST:
        raise UsageError(f"{text!r} is too large")
    return int(value)


def size(text: str) -> int:
    """Bytes: 1000000, 256MiB, 1.5GB."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is not a size such as 256MiB")
    number, unit, binary = found.groups()
    scale = (1024 if binary else 1000) ** (" kmgt".index(unit.lower()) if unit else 0)
    value = int(_fraction(number) * scale)
    if value >= _LARGEST:
        raise UsageError(f"{text!r} is too large")
    return value


def number(text: str) -> float:
    """A number: 0.25, -0.5, 1/3, 25%."""
    try:
        if text.strip().endswith("%"):
            return float(text.strip()[:-1]) / 100
        above, slash, below = text.partition("/")
        return float(above) / float(below if slash else 1)
    except (ValueError, ZeroDivisionError):  # of float()
        raise UsageError(f"{text!r} is not a number such as 0.25, 1/3 or 25%") from None


def several(one: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """What reads values separated by commas, each by ``one``."""

    def read(text: str) -> tuple[T, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise UsageError(f"{text!r} lacks a value before or after a comma")
        return tuple(map(one, parts))

    return read


def local_path(text: str | Path, option: str = "") -> Path:
    """A path of a mounted file system. An address of object storage is none.

    Args:
        option: it was given to, for the message.
    """
    if _ADDRESS.match(str(text)):
        raise UsageError(
            f"{option}{' ' if option else ''}{text} is an address, not a path: only mounted file "
            "systems are read and written. Mount the storage or copy the checkpoints, and give the "
            "folder"
        )
    return Path(text)


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace("_", ""))
