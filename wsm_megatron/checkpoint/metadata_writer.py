"""What is written last: ``.metadata``, which says where everything is, and ``metadata.json``.

``.metadata`` is a pickle of ``torch.distributed.checkpoint``'s classes. It is written opcode by
opcode: to pickle them, that package would have to be imported, which takes half as long as torch
itself, and 100,000 chunks would become a million objects first. Every object is made by a call of
its class, so fields that another torch has added get their defaults.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.checkpoint.formats import MARKER_FILE, METADATA_FILE, KeyPath
from wsm_megatron.checkpoint.writer import Placed, write_file

_DCP_VERSION = "1.0.0"
_CLASSES = "torch.distributed.checkpoint.metadata"
_PROTOCOL = 2


def write_metadata(
    directory: Path,
    placed: Sequence[Placed],
    mcore_data: dict[str, Any],
    paths: Mapping[str, KeyPath] | None = None,
) -> tuple[int, int]:
    """Write ``.metadata`` for everything placed, durably; its size and CRC-32."""
    return write_file(directory / METADATA_FILE, pickle_metadata(placed, mcore_data, paths))


def write_marker(directory: Path, marker: dict[str, Any]) -> tuple[int, int]:
    """Write ``metadata.json``, which tells Megatron that the checkpoint is complete."""
    return write_file(directory / MARKER_FILE, json.dumps(marker).encode())


def pickle_metadata(
    placed: Iterable[Placed],
    mcore_data: dict[str, Any],
    paths: Mapping[str, KeyPath] | None = None,
) -> bytes:
    """A pickle of torch's ``Metadata`` for everything placed.

    Args:
        mcore_data: Megatron's attribute of that name, of plain values.
        paths: torch's ``planner_data``: by key, where in a nested state dict an entry is.
    """
    chunks: dict[str, list[Placed]] = {}
    for one in placed:
        chunks.setdefault(one.item.key, []).append(one)
    program = _Program()
    program.name(_CLASSES, "Metadata")
    _push_entries(program, chunks)
    program.do(pickle.TUPLE1 + pickle.REDUCE + pickle.EMPTY_DICT + pickle.MARK)
    program.text("version")
    program.text(_DCP_VERSION)
    program.text("storage_data")
    _push_storage(program, chunks)
    if paths:
        program.text("planner_data")
        program.last(dict(paths))
    if mcore_data:
        program.text("mcore_data")
        program.last(mcore_data)
    program.do(pickle.SETITEMS + pickle.BUILD + pickle.STOP)
    return bytes(program.code)


def _push_entries(program: _Program, chunks: dict[str, list[Placed]]) -> None:
    """Push the table of entries: a tensor's dtype, shape and chunks, or that it is bytes."""
    program.do(pickle.EMPTY_DICT + pickle.MARK)
    for key, stored in chunks.items():
        program.text(key)
        item = stored[0].item
        if item.region is None:
            program.name(_CLASSES, "BytesStorageMetadata")
            program.do(pickle.EMPTY_TUPLE + pickle.REDUCE)
            continue
        assert item.dtype is not None
        program.name(_CLASSES, "TensorStorageMetadata")
        program.name(_CLASSES, "TensorProperties")
        program.name("torch", str(item.dtype).removeprefix("torch."))
        program.do(pickle.TUPLE1 + pickle.REDUCE)
        program.size(item.shape)
        program.do(pickle.EMPTY_LIST + pickle.MARK)
        for one in stored:
            assert one.item.region is not None
            program.name(_CLASSES, "ChunkStorageMetadata")
            program.size(one.item.region.offsets)
            program.size(one.item.region.sizes)
            program.do(pickle.TUPLE2 + pickle.REDUCE)
        program.do(pickle.APPENDS + pickle.TUPLE3 + pickle.REDUCE)
    program.do(pickle.SETITEMS)


def _push_storage(program: _Program, chunks: dict[str, list[Placed]]) -> None:
    """Push the table of places: an entry or chunk, its file, offset and length."""
    program.do(pickle.EMPTY_DICT + pickle.MARK)
    for key, stored in chunks.items():
        for one in stored:
            program.name(_CLASSES, "MetadataIndex")
            program.text(key)
            if one.item.region is None:
                program.do(pickle.TUPLE1)
            else:
                program.size(one.item.region.offsets)
                program.do(pickle.TUPLE2)
            program.do(pickle.REDUCE)
            program.name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            program.text(one.file)
            program.number(one.offset)
            program.number(one.item.stored_bytes)
            program.do(pickle.TUPLE3 + pickle.REDUCE)
    program.do(pickle.SETITEMS)


class _Program:
    """Opcodes of a pickle; a value that comes again is taken from the unpickler's memo."""

    def __init__(self) -> None:
        self.code = bytearray(pickle.PROTO + bytes([_PROTOCOL]))
        self._memo: dict[Hashable, int] = {}

    def do(self, opcodes: bytes) -> None:
        self.code += opcodes

    def name(self, module: str, name: str) -> None:
        """Push a class, a function or a dtype."""
        if not self._recalled((module, name)):
            self.code += pickle.GLOBAL + f"{module}\n{name}\n".encode()
            self._keep((module, name))

    def text(self, text: str) -> None:
        if not self._recalled(text):
            data = text.encode()
            self.code += pickle.BINUNICODE + len(data).to_bytes(4, "little") + data
            self._keep(text)

    def size(self, sizes: tuple[int, ...]) -> None:
        """Push a ``torch.Size``."""
        if not self._recalled(sizes):
            self.name("torch", torch.Size.__name__)
            self.code += pickle.MARK
            for number in sizes:
                self.number(number)
            self.code += pickle.TUPLE + pickle.TUPLE1 + pickle.REDUCE
            self._keep(sizes)

    def number(self, number: int) -> None:
        self.code += _bare(number)

    def last(self, value: Any) -> None:
        """Push any plain value. Its pickle has a memo of its own, which replaces this one's."""
        self.code += _bare(value)
        self._memo.clear()

    def _recalled(self, value: Hashable) -> bool:
        """Push a value that was kept; whether it was."""
        place = self._memo.get(value)
        if place is None:
            return False
        if place < 256:
            self.code += pickle.BINGET + bytes([place])
        else:
            self.code += pickle.LONG_BINGET + place.to_bytes(4, "little")
        return True

    def _keep(self, value: Hashable) -> None:
        """Let the unpickler keep what is on top of its stack."""
        place = self._memo[value] = len(self._memo)
        self.code += pickle.LONG_BINPUT + place.to_bytes(4, "little")


def _bare(value: Any) -> bytes:
    """A value's pickle without its first and last opcode."""
    return pickle.dumps(value, _PROTOCOL)[2:-1]
