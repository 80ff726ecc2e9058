"""JSON from files that may be damaged or forged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wsm_megatron.errors import MergeError
from wsm_megatron.storage.retry import with_retries

MAX_DEPTH = 50
"""How deep lists and objects may lie in each other."""
MAX_BYTES = 2**30


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ``MergeError``, which names it, for anything else."""
    size = with_retries(path.stat, lambda: f"{path}: looking").st_size
    if size > MAX_BYTES:
        raise MergeError(f"{path} is damaged ({size} bytes)")
    try:
        return parse_json(with_retries(path.read_bytes, lambda: f"{path}: reading"))
    except ValueError as error:
        raise MergeError(f"{path} is damaged ({error})") from error


def parse_json(text: bytes | str) -> Any:
    """A JSON value of bounded depth, no name in it twice.

    Raises ``ValueError`` for anything else.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError("its values are nested too deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found
