"""The container around one chunk: a ``torch.save`` zip archive holding one tensor.

A ``.distcp`` file is a row of such archives. Reading needs only where the raw storage lies and
which CRC-32 it carries; writing needs the bytes before and after it. Storage itself is neither read
nor written here.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

_ALIGNMENT = 64
_STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Record:
    """Raw storage of one tensor; ``start`` counts from the start of its container."""

    start: int
    nbytes: int
    crc: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _TensorStub:
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def locate(container: io.BufferedIOBase) -> Record:
    """Find the tensor's storage in a container.

    Args:
        container: seekable binary stream over exactly one container.

    Raises:
        ValueError: not a container of one contiguous dense tensor, or a damaged one.
    """
    try:
        archive = zipfile.ZipFile(container)
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        stub = _TensorUnpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
        storage = entries.get("data/0")
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, EOFError, struct.error) as error:
        raise ValueError(f"not a readable torch.save container ({error})") from error
    if storage is None or not isinstance(stub, _TensorStub):
        raise ValueError("the container does not hold a plain tensor")
    nbytes = torch.Size(stub.shape).numel() * stub.dtype.itemsize
    if (
        stub.offset
        or stub.stride != _contiguous_stride(stub.shape)
        or storage.compress_type != zipfile.ZIP_STORED
        or storage.file_size != nbytes
    ):
        raise ValueError("the container's tensor is not one contiguous uncompressed storage")
    container.seek(storage.header_offset)
    header = container.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("the storage record's header is damaged")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = storage.header_offset + 30 + name_bytes + extra_bytes
    return Record(start, nbytes, storage.CRC, stub.dtype, stub.shape)


class _TensorUnpickler(pickle.Unpickler):
    """Turns the pickle of one tensor into a stub; admits the four names it needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _stub
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a tensor's pickle")

    def persistent_load(self, pid: Any) -> torch.dtype:
        kind, dtype, key, _location, _numel = pid
        if kind != "storage" or key != "0":
            raise pickle.UnpicklingError("more than one storage in a tensor's container")
        return dtype


def _stub(dtype: torch.dtype, offset: int, shape: tuple, stride: tuple, *_: Any) -> _TensorStub:
    return _TensorStub(dtype, offset, tuple(shape), tuple(stride))


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


class Frame:
    """The bytes before and after one tensor's storage, as ``torch.save`` would lay them out.

    Both lengths depend on dtype and shape alone, so that a file's layout is known before a byte of
    data is. The storage starts at a multiple of 64 bytes from the container's start.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]):
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        assert self.nbytes < 2**32 - 2**16, "zip64 containers are not written; split the chunk"
        self._small = [
            ("archive/data.pkl", _tensor_pickle(dtype, shape)),
            ("archive/.format_version", b"1"),
            ("archive/.storage_alignment", b"64"),
            ("archive/byteorder", b"little"),
            ("archive/version", b"3\n"),
        ]
        prefix, suffix = self.around(0)
        self.prefix_bytes = len(prefix)
        self.total_bytes = len(prefix) + self.nbytes + len(suffix)

    def around(self, crc: int) -> tuple[bytes, bytes]:
        """Prefix and suffix for storage whose CRC-32 is ``crc``."""
        body, directory = bytearray(), bytearray()
        for name, data in self._small:
            self._add(body, directory, name, len(data), zlib.crc32(data))
            body += data
        self._add(body, directory, "archive/data/0", self.nbytes, crc)
        end = struct.pack(
            "<4s4H2LH",
            b"PK\x05\x06",
            0,
            0,
            len(self._small) + 1,
            len(self._small) + 1,
            len(directory),
            len(body) + self.nbytes,
            0,
        )
        return bytes(body), bytes(directory + end)

    @staticmethod
    def _add(body: bytearray, directory: bytearray, name: str, size: int, crc: int) -> None:
        """Append a record's local header, padded so that its data is aligned, and its entry."""
        encoded = name.encode()
        padding = -(len(body) + 30 + len(encoded) + 4) % _ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        versions_flags_method_time = (0, 0, 0, 0, 0x21)  # stored, 1980-01-01: reproducible
        common = struct.pack("<5H3L", *versions_flags_method_time, crc, size, size)
        directory += struct.pack("<4sH", b"PK\x01\x02", 0) + common
        directory += struct.pack("<5H2L", len(encoded), 0, 0, 0, 0, 0, len(body)) + encoded
        body += b"PK\x03\x04" + common + struct.pack("<2H", len(encoded), len(extra))
        body += encoded + extra


class _StorageReference:
    """Stands for the storage in the pickle of :func:`_tensor_pickle`."""

    def __init__(self, dtype: torch.dtype, numel: int):
        self.dtype, self.numel = dtype, numel


class _TensorReference:
    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape

    def __reduce__(self) -> tuple[Callable, tuple]:
        storage = _StorageReference(self.dtype, torch.Size(self.shape).numel())
        stride = _contiguous_stride(self.shape)
        hooks: collections.OrderedDict = collections.OrderedDict()
        return _rebuild_tensor_v2, (storage, 0, self.shape, stride, False, hooks)


class _TensorPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, _StorageReference):
            return None
        names = {dtype: name for name, dtype in _STORAGE_DTYPES.items()}
        return "storage", getattr(torch, names[obj.dtype]), "0", "cpu", obj.numel


def _tensor_pickle(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=2).dump(_TensorReference(dtype, tuple(shape)))
    return buffer.getvalue()
