"""``.metadata`` of a checkpoint through an unpickler that knows the metadata classes and no other.

A pickle can name any importable function and have it called. Here every name is looked up in a
table of what ``torch.distributed.checkpoint`` and Megatron themselves write, and gives a class that
stands in for theirs; anything else is refused by name, and nothing is imported.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.errors import MergeError
from wsm_megatron.safe_pickle.metadata_classes import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Ignored,
    MemoryFormat,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from wsm_megatron.safe_pickle.scan import check_pickle

_MOST_BYTES = 2**32
_LONGEST_NAME, _LONGEST_KEY = 255, 4096
_MOST_ELEMENTS = 2**60
_DEEPEST = 64
"""Dicts in dicts, of a state dict."""


def load_metadata(path: Path) -> Metadata:
    """Read the ``.metadata`` file of a ``torch_dist`` checkpoint.

    Runs nothing that the file names: only stand-ins for the classes of
    ``torch.distributed.checkpoint`` are built, from the file's own values; a field that a merge has
    no use for is left out. The two tables come back with the types that ``Metadata`` declares;
    whether they agree with each other and with the files is not checked.

    Raises:
        MergeError: the file cannot be read, is damaged, or refers to anything else (named).
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise MergeError(f"{path}: {size} bytes are more than any checkpoint's: damaged")
        data = path.read_bytes()
        check_pickle(data)
        loaded = _MetadataUnpickler(data, path).load()
    except MergeError:
        raise
    except Exception as error:  # damaged bytes can raise anything at all
        reason = " ".join(f"{type(error).__name__}: {error}"[:500].split())
        raise MergeError(f"{path}: cannot be read, damaged or truncated ({reason})") from error
    _check(loaded, path)
    return loaded


def key_paths(path: Path, loaded: Metadata) -> dict[str, tuple[str | int, ...]]:
    """Where in a nested state dict the entries of a ``.metadata`` are, as torch's planner keeps it
    (``planner_data``); empty where it says nothing. Raises ``MergeError`` for damage."""
    if not loaded.planner_data:
        return {}
    _check_table(path, "planner_data", loaded, _is_key_path)
    return loaded.planner_data


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise MergeError(
                f"{self._path}: refers to {_shown(f'{module}.{name}')[1:-1]}, which checkpoint "
                "metadata has no use for; refused, and nothing in the file was run"
            ) from None


def _empty_dict() -> dict[Any, Any]:
    """An ``OrderedDict`` as it is pickled: made empty, then filled."""
    return {}


_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies"
_DTYPES = {("torch", n): v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}
_ADMITTED: dict[tuple[str, str], Any] = {
    **{
        (f"{_DCP}.metadata", one.__name__): one
        for one in (
            Metadata,
            MetadataIndex,
            ChunkStorageMetadata,
            TensorStorageMetadata,
            BytesStorageMetadata,
            TensorProperties,
        )
    },
    (f"{_DCP}.filesystem", "_StorageInfo"): StorageInfo,
    # Where torch 2.3 and earlier kept TensorProperties.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): TensorProperties,
    ("torch", "Size"): torch.Size,
    **_DTYPES,
    (f"{_MCORE}.torch", "MCoreMetadata"): Metadata,  # core 0.15
    ("collections", "OrderedDict"): _empty_dict,
    # What is written and says nothing to a merge: how a plan was made, where it was saved to.
    (f"{_DCP}.metadata", "StorageMeta"): Ignored,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): MemoryFormat,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): MemoryFormat,
    ("torch.serialization", "_get_layout"): Ignored,
    (f"{_DCP}.filesystem", "_StoragePrefix"): Ignored,
    (f"{_MCORE}.torch", "MCoreSavePlan"): Ignored,  # core 0.14 and 0.15
    **{
        (f"{_DCP}.planner", name): Ignored
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    },
    ("pathlib", "PosixPath"): Ignored,
    ("pathlib._local", "PosixPath"): Ignored,
}


def _check(loaded: Any, path: Path) -> None:
    if type(loaded) is not Metadata:
        raise MergeError(f"{path}: holds a {type(loaded).__name__}, not checkpoint metadata")
    _check_table(path, "state_dict_metadata", loaded, _is_entry)
    _check_table(path, "storage_data", loaded, _is_storage)
    _check_table(path, "mcore_data", loaded, _is_of_megatron)


def _check_table(
    path: Path, name: str, loaded: Metadata, is_sound: Callable[[Any, Any], bool]
) -> None:
    table = getattr(loaded, name, None)
    if not isinstance(table, dict):
        raise MergeError(f"{path}: {name} is a {type(table).__name__}, not a table: damaged")
    for key, value in table.items():
        try:
            sound = is_sound(key, value)
        except (AttributeError, TypeError, ValueError):  # it lacks what its class promises
            sound = False
        if not sound:
            raise MergeError(f"{path}: {name} is damaged at {_shown(key)}")


def _is_entry(key: Any, value: Any) -> bool:
    if not _is_key(key):
        return False
    if not isinstance(value, TensorStorageMetadata):
        return isinstance(value, BytesStorageMetadata)
    rank = len(value.size)
    return (
        isinstance(value.properties.dtype, torch.dtype)
        and isinstance(value.size, torch.Size)
        and _is_shape(value.size, rank)
        and math.prod(value.size) <= _MOST_ELEMENTS
        and isinstance(value.chunks, list)
        and all(_is_shape(c.offsets, rank) and _is_shape(c.sizes, rank) for c in value.chunks)
    )


def _is_shape(size: Any, rank: int) -> bool:
    """Whether this is a size or an offset; Megatron FSDP makes those of chunks plain tuples."""
    if not isinstance(size, tuple) or len(size) != rank:
        return False
    numbers = isinstance(size, torch.Size) or all(type(number) is int for number in size)
    return numbers and (not size or min(size) >= 0)


def _is_storage(key: Any, value: Any) -> bool:
    offset, length = value.offset, value.length
    return (
        isinstance(key, MetadataIndex)
        and _is_key(key.fqn)
        and isinstance(value, StorageInfo)
        and _is_file_name(value.relative_path)
        and isinstance(offset, int)
        and isinstance(length, int)
        and 0 <= offset <= offset + length < _MOST_ELEMENTS
    )


def _is_key(key: Any) -> bool:
    """Whether this is text that a message can show, on a line."""
    return isinstance(key, str) and _bytes_of(key) <= _LONGEST_KEY


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and _bytes_of(name) <= _LONGEST_NAME


@lru_cache(maxsize=2**12)  # for text alone: a deep tuple must not be hashed
def _bytes_of(text: str) -> float:
    """Bytes of a name in a file system; infinite for text that is more than a line."""
    return len(os.fsencode(text)) if text.isprintable() else math.inf


def _is_of_megatron(key: Any, value: Any) -> bool:
    """Whether this is what Megatron attaches to a tensor: shapes and numbers by name."""
    return (
        _is_key(key)
        and isinstance(value, dict)
        and all(_is_key(name) and _is_plain(one) for name, one in value.items())
    )


def _is_key_path(key: Any, value: Any) -> bool:
    """Whether this is where in a nested dict an entry is."""
    return (
        _is_key(key)
        and isinstance(value, tuple)
        and 0 < len(value) <= _DEEPEST
        and all(_is_key(part) or type(part) is int for part in value)
    )


def _is_plain(value: Any) -> bool:
    parts = value if isinstance(value, (tuple, list)) else [value]
    return all(part is None or isinstance(part, (bool, int, str)) for part in parts)


def _shown(key: Any) -> str:
    name = key if isinstance(key, str) else getattr(key, "fqn", None)
    return ascii(name[:200]) if isinstance(name, str) else f"a key of type {type(key).__name__}"
