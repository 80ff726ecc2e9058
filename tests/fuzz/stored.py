"""Changing ``.metadata`` by PyTorch's own classes, and what it points to."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata


def load(checkpoint: Path) -> Metadata:
    """The metadata of a checkpoint of the tests' own: no other is unpickled like this."""
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def change(checkpoint: Path, by: Callable[[Metadata], Any]) -> None:
    metadata = load(checkpoint)
    by(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def tensors(metadata: Metadata) -> list[str]:
    entries = metadata.state_dict_metadata.items()
    return [key for key, entry in entries if isinstance(entry, TensorStorageMetadata)]


def objects(metadata: Metadata) -> list[str]:
    return [key for key in metadata.state_dict_metadata if key not in set(tensors(metadata))]


def read(checkpoint: Path, info: _StorageInfo) -> bytes:
    with (checkpoint / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        return file.read(info.length)


def replace(checkpoint: Path, index: MetadataIndex, data: bytes) -> None:
    """Store other bytes for an entry, behind all others of its file."""

    def point(metadata: Metadata) -> None:
        info = metadata.storage_data[index]
        path = checkpoint / info.relative_path
        info.offset, info.length = path.stat().st_size, len(data)
        with path.open("ab") as file:
            file.write(data)

    change(checkpoint, point)
