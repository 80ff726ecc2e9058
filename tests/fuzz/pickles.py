"""Pickles that would harm who loads them."""

from __future__ import annotations

import pickle
from random import Random
from typing import Any

_DEEP = b")" + pickle.TUPLE1 * 10**5


def _doubled(start: bytes, once: bytes, times: int) -> bytes:
    parts = [start]
    for n in range(times):
        place = n.to_bytes(4, "little")
        parts.append(pickle.LONG_BINPUT + place + pickle.LONG_BINGET + place + once)
    return b"".join(parts)


def bomb(chance: Random) -> bytes:
    """Huge memos, deep and doubled values, lengths that lie."""
    memo = chance.choice((2**16, 2**24, 2**27, 2**31)).to_bytes(4, "little")
    body = chance.choice(
        (
            b"N" + pickle.LONG_BINPUT + memo,
            b"}" + _DEEP + b"Ns",
            b"}" + _doubled(b")", pickle.TUPLE2, 60) + b"Ns",
            b"c__builtin__\nset\n](" + _DEEP + b"e\x85R",
            b"]" * 10**5 + b"a" * (10**5 - 1),
            _doubled(b"]", pickle.TUPLE2, 60),
            _doubled(b"cmegatron\nX\n)R", pickle.TUPLE2, 60),
            b"]" + pickle.LONG_BINPUT + bytes(4) + pickle.LONG_BINGET + bytes(4) + b"a",
            b"\x8b\xff\xff\xff\x7f",
            b"\x8e" + b"\xff" * 7 + b"\x7f",
            b"\x95" + b"\xff" * 7 + b"\x7f",
            b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R",
            b"c__builtin__\nrange\nJ\xff\xff\xff\x7f\x85R",
            b"ctorch\nSize\n(J\xff\xff\xff\x7f" + b"J\xff\xff\xff\x7f" * 9 + b"t\x85R",
        )
    )
    return b"\x80\x04" + body + b"."


class _Attack:
    def __init__(self, module: str, name: str, *arguments: Any):
        self.module, self.name, self.arguments = module, name, arguments

    def __reduce__(self) -> Any:
        import importlib

        return getattr(importlib.import_module(self.module), self.name), self.arguments


def hostile(chance: Random) -> Any:
    """Pickles as a call that leaves a trace."""
    return chance.choice(
        (
            _Attack("posix", "system", "touch fuzz-was-here"),
            _Attack("builtins", "eval", "open('fuzz-was-here', 'w')"),
            _Attack("builtins", "open", "fuzz-was-here", "w"),
            _Attack("subprocess", "Popen", ["touch", "fuzz-was-here"]),
            _Attack("tests.fuzz.evil", "run", 1),
            _Attack("torch", "load", "fuzz-was-here"),
        )
    )
