"""``.metadata`` of a checkpoint through an unpickler that knows the metadata classes and no other.

A pickle can name any importable function and have it called. Here every name is looked up in a
table of what ``torch.distributed.checkpoint`` itself writes, and gives a class that stands in for
torch's; anything else is refused by name, and nothing is imported.
"""

from __future__ import annotations

import collections
import copyreg
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Ignored,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from wsm_megatron.errors import MergeError


def load_metadata(path: Path) -> Metadata:
    """Read the ``.metadata`` file of a ``torch_dist`` checkpoint.

    Runs nothing that the file names: only stand-ins for the classes of
    ``torch.distributed.checkpoint`` are built, from the file's own values; a field that a merge has
    no use for is left out. The two tables come back with the types that ``Metadata`` declares;
    whether they agree with each other and with the files is not checked.

    Raises:
        MergeError: the file cannot be read, is damaged, or refers to anything else (named).
    """
    # Ids of the extension registry would otherwise come from its cache, past find_class.
    copyreg.clear_extension_cache()
    try:
        with open(path, "rb") as file:
            loaded = _MetadataUnpickler(file, path).load()
    except MergeError:
        raise
    except Exception as error:  # damaged bytes can raise anything at all
        reason = f"{type(error).__name__}: {error}"
        raise MergeError(f"{path}: cannot be read, damaged or truncated ({reason})") from error
    _check(loaded, path)
    return loaded


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise MergeError(
                f"{self._path}: refers to {module}.{name}, which checkpoint metadata has no use "
                "for; refused, and nothing in the file was run"
            ) from None


_DCP = "torch.distributed.checkpoint"
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
    ("collections", "OrderedDict"): collections.OrderedDict,
    # What is written and says nothing to a merge: how a plan was made, where it was saved to.
    (f"{_DCP}.metadata", "StorageMeta"): Ignored,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): Ignored,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Ignored,
    ("torch.serialization", "_get_layout"): Ignored,
    (f"{_DCP}.filesystem", "_StoragePrefix"): Ignored,
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


def _check_table(
    path: Path, name: str, loaded: Metadata, is_sound: Callable[[Any, Any], bool]
) -> None:
    table = getattr(loaded, name, None)
    if not isinstance(table, dict):
        raise MergeError(f"{path}: {name} is a {type(table).__name__}, not a table: damaged")
    for key, value in table.items():
        try:
            sound = is_sound(key, value)
        except (AttributeError, TypeError):  # a value that lacks what its class promises
            sound = False
        if not sound:
            raise MergeError(f"{path}: {name} is damaged at {_shown(key)}")


def _is_entry(key: Any, value: Any) -> bool:
    if not isinstance(key, str):
        return False
    if not isinstance(value, TensorStorageMetadata):
        return isinstance(value, BytesStorageMetadata)
    sizes = [value.size, *(s for c in value.chunks for s in (c.offsets, c.sizes))]
    return isinstance(value.properties.dtype, torch.dtype) and all(
        isinstance(size, torch.Size) and len(size) == len(value.size) for size in sizes
    )


def _is_storage(key: Any, value: Any) -> bool:
    return (
        isinstance(key, MetadataIndex)
        and isinstance(key.fqn, str)
        and (key.offset is None or isinstance(key.offset, torch.Size))
        and isinstance(value, StorageInfo)
        and isinstance(value.relative_path, str)
        and all(isinstance(n, int) and n >= 0 for n in (value.offset, value.length))
    )


def _shown(key: Any) -> str:
    name = key if isinstance(key, str) else getattr(key, "fqn", None)
    return repr(name[:200]) if isinstance(name, str) else f"a key of type {type(key).__name__}"
