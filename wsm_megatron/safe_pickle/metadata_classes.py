"""Stand-ins for the classes of ``.metadata``, which are ``torch.distributed.checkpoint``'s.

Importing that package takes half as long as torch itself; a merge needs only what these classes
hold. Fields keep torch's names and types, those that a merge has no use for are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


class _StandIn:
    """An object that a pickle makes empty and fills with a dict of its fields.

    With ``__setstate__``, BUILD cannot set the attributes of a class itself.
    """

    __slots__: tuple[str, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in self.__slots__:
            setattr(self, name, state[name])

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__} stands in for torch's class of that name")


class Ignored(_StandIn):
    """Anything that a merge has no use for; made, filled and forgotten."""

    __slots__ = ()

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(slots=True)
class ChunkStorageMetadata(_StandIn):
    """A region of a global tensor."""

    offsets: torch.Size
    sizes: torch.Size


class MemoryFormat(Ignored):
    """``_MEM_FORMAT_ENCODING``: contiguous, channels last, preserved. torch takes nothing else."""

    __slots__ = ()

    def __init__(self, number: int) -> None:
        if number not in (0, 1, 2):
            raise ValueError(f"memory format {number!r}")


@dataclass(slots=True)
class TensorProperties(_StandIn):
    """Of these, only the dtype still means anything."""

    dtype: torch.dtype

    def __setstate__(self, state: Any) -> None:
        self.dtype, _layout, _requires_grad, memory_format, _pin_memory = state
        if not isinstance(memory_format, MemoryFormat):
            raise ValueError("a tensor's properties without a memory format")


@dataclass(slots=True)
class TensorStorageMetadata(_StandIn):
    """A global tensor and the regions that are stored."""

    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


@dataclass(slots=True)
class BytesStorageMetadata(_StandIn):
    """An object; the storage knows its length."""


@dataclass(slots=True, eq=False)
class MetadataIndex(_StandIn):
    """What is stored: a key, and for a tensor the offsets of one of its chunks."""

    fqn: str
    offset: torch.Size | None = None

    def __init__(self, fqn: str, offset: Any = None, _: int | None = None) -> None:
        self._set(fqn, offset)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set(state["fqn"], state.get("offset"))

    def _set(self, fqn: Any, offset: Any) -> None:
        # It is hashed before anyone else could look: a deep tuple would overflow the stack.
        if not isinstance(fqn, str) or not (offset is None or isinstance(offset, torch.Size)):
            raise TypeError("an index of anything but a name and offsets")
        self.fqn, self.offset = fqn, offset

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, MetadataIndex)
            and self.fqn == other.fqn
            and self.offset == other.offset
        )

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))


@dataclass(slots=True)
class StorageInfo(_StandIn):
    """Where it is stored, in bytes; ``_StorageInfo`` of torch's file system writer."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.relative_path, self.offset = state["relative_path"], state["offset"]
        self.length = state["length"]
        self.transform_descriptors = state.get("transform_descriptors")


@dataclass(slots=True)
class Metadata(_StandIn):
    """All of ``.metadata`` that a merge reads; ``mcore_data`` is what Megatron adds, and
    ``planner_data`` says where in a nested state dict the entries are, in some formats."""

    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    storage_data: dict[MetadataIndex, StorageInfo] | None = None
    mcore_data: dict[str, Any] = field(default_factory=dict)
    planner_data: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "state_dict_metadata" in state:
            self.state_dict_metadata = state["state_dict_metadata"]
        self.storage_data = state.get("storage_data")
        self.mcore_data = state.get("mcore_data") or {}
        self.planner_data = state.get("planner_data")
