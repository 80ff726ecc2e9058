"""A pickle looked through before it is loaded: what it would build, and whether that is sane.

An unpickler does as it is told: nine bytes reserve gigabytes for its memo, doubled lists grow
exponentially for whoever compares or copies them, and hashing a deep tuple overflows the stack of
the process. Here the opcodes are followed on a stack of sizes; nothing is made. What passes is a
tree of bounded depth and size whose keys are cheap to hash.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass

try:
    from wsm_megatron.safe_pickle import _pickle_scan  # type: ignore[attr-defined]
except ImportError:  # not built: the same in Python, about fifty times slower
    _pickle_scan = None

MAX_DEPTH = 100
"""How deep values may lie in each other; a checkpoint's lie about fifteen deep."""
MAX_GROWTH = 16
"""Nodes of the tree, shared ones counted each time, for each byte of the pickle."""
MAX_ODD_KEYS = 1000
"""Keys whose hash a file can choose: floats, large integers, tuples."""


def check_pickle(data: bytes) -> None:
    """Raise ``pickle.UnpicklingError`` unless a pickle is one that a checkpoint may hold.

    It must end with its last byte, use opcodes of protocols 2 to 5 that picklers write for values,
    fill its memo in order, and never change what it has fetched from there, by which alone a value
    could contain itself. Depth, size and keys are bounded as above.
    """
    scan = scan_in_python if _pickle_scan is None else _pickle_scan.scan
    problem = scan(data, MAX_DEPTH, MAX_GROWTH * len(data), MAX_ODD_KEYS)
    if problem is not None:
        raise pickle.UnpicklingError(problem)


def scan_in_python(data: bytes, max_depth: int, max_size: int, max_odd_keys: int) -> str | None:
    """What is wrong with a pickle; None for nothing."""
    scan = _Scan(max_depth, max_odd_keys)
    end = -1
    try:
        for opcode, argument, position in pickletools.genops(data):
            scan.step(opcode.name, argument)
            end = position or 0
        if end != len(data) - 1 or len(scan.stack) != 1 or scan.stack[0] is _MARK:
            raise _ProblemError("does not end where its value does")
        if scan.stack[0].size > max_size:
            raise _ProblemError("holds one value in another too often")
    except _ProblemError as problem:
        return f"it {problem}"
    except (ValueError, IndexError):
        return "it is damaged or cut short"
    return None


class _ProblemError(Exception):
    pass


@dataclass
class _Node:
    """A value that would be made. Names, calls and containers can be changed until fetched."""

    kind: int
    depth: int = 0
    size: int = 1
    fetched: bool = False


# Text, bytes, None and small integers; other scalars; tuples of both; names and what calls make;
# all else, which is no key.
_PLAIN, _ODD, _FLAT, _MADE, _TREE = range(5)
_MARK = _Node(_TREE)

_PUSHES = {
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"), _PLAIN),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _PLAIN),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _PLAIN),
    **dict.fromkeys(("BINFLOAT", "LONG1", "LONG4"), _ODD),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), _TREE),
    "EMPTY_TUPLE": _FLAT,
    "GLOBAL": _MADE,
}
_CALLS = {"REDUCE": 2, "NEWOBJ": 2, "STACK_GLOBAL": 2, "BINPERSID": 1}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CHANGES = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_CHANGES_FROM_MARK = {"APPENDS", "SETITEMS", "ADDITEMS"}


class _Scan:
    """The unpickler's stack and memo, of nodes; every step is one opcode."""

    def __init__(self, max_depth: int, max_odd_keys: int):
        self.stack: list[_Node] = []
        self._memo: list[_Node] = []
        self._max_depth, self._odd_keys_left = max_depth, max_odd_keys

    def step(self, name: str, argument: object) -> None:
        if name in _PUSHES:
            self.stack.append(_Node(_PUSHES[name]))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._put(len(self._memo) if name == "MEMOIZE" else argument)
        elif name in ("BINGET", "LONG_BINGET"):
            self._get(argument)
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name in _TUPLES:
            self._make_tuple(self._popped(_TUPLES[name]))
        elif name == "TUPLE":
            self._make_tuple(self._popped_to_mark())
        elif name == "FROZENSET":
            self._make(_TREE, self._keys(self._popped_to_mark()))
        elif name in _CALLS:
            self._make(_MADE, self._popped(_CALLS[name]))
        elif name in _CHANGES:
            self._change(name, self._popped(_CHANGES[name]))
        elif name in _CHANGES_FROM_MARK:
            self._change(name, self._popped_to_mark())
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _ProblemError("uses an opcode that no checkpoint needs")

    def _put(self, place: object) -> None:
        assert isinstance(place, int)
        if place > len(self._memo) or self.stack[-1] is _MARK:
            raise _ProblemError("does not fill its memo in order")
        self._memo[place : place + 1] = [self.stack[-1]]

    def _get(self, place: object) -> None:
        assert isinstance(place, int)
        self._memo[place].fetched = True
        self.stack.append(self._memo[place])

    def _popped(self, count: int) -> list[_Node]:
        parts = self.stack[-count:]
        if len(parts) < count or any(part is _MARK for part in parts):
            raise IndexError
        del self.stack[-count:]
        return parts

    def _popped_to_mark(self) -> list[_Node]:
        count = 0
        while self.stack[-count - 1] is not _MARK:
            count += 1
        parts = self._popped(count) if count else []
        self.stack.pop()
        return parts

    def _make_tuple(self, parts: Sequence[_Node]) -> None:
        self._make(_FLAT if all(part.kind <= _ODD for part in parts) else _TREE, parts)

    def _make(self, kind: int, parts: Sequence[_Node]) -> None:
        self.stack.append(_Node(kind))
        self._add(self.stack[-1], parts)

    def _change(self, name: str, parts: Sequence[_Node]) -> None:
        changed = self.stack[-1]
        if changed is _MARK or changed.kind < _MADE:
            raise IndexError
        if changed.fetched:
            raise _ProblemError("changes a value that it has fetched from its memo")
        if name.startswith("SETITEM"):
            self._keys(parts[::2])
        elif name == "ADDITEMS":
            self._keys(parts)
        self._add(changed, parts)

    def _add(self, node: _Node, parts: Sequence[_Node]) -> None:
        node.depth = max(node.depth, 1 + max((part.depth for part in parts), default=0))
        node.size += sum(part.size for part in parts)
        if node.depth > self._max_depth:
            raise _ProblemError("nests its values too deep")

    def _keys(self, keys: Sequence[_Node]) -> Sequence[_Node]:
        for key in keys:
            if key.kind == _TREE:
                raise _ProblemError("has a container for a key")
            self._odd_keys_left -= key.kind in (_ODD, _FLAT)
        if self._odd_keys_left < 0:
            raise _ProblemError("has too many keys that are no text")
        return keys
