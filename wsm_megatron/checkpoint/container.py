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
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from wsm_megatron.safe_pickle.archive import read_archive
from wsm_megatron.safe_pickle.scan import check_pickle

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
STORED = frozenset(_STORAGE_DTYPES.values())
"""Dtypes of tensors that such a container holds. ``torch.save`` has another one for the others."""


@dataclass(frozen=True)
class Record:
    """Raw storage of one tensor; ``start`` counts from the start of its container."""

    start: int
    nbytes: int
    crc: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def locate(container: io.BufferedIOBase) -> Record:
    """Find the tensor's storage in a container; everything around it is checked.

    Args:
        container: seekable binary stream over exactly one container.

    Raises:
        ValueError: not a container of one contiguous dense tensor, or a damaged one.
    """

    def read(start: int, length: int) -> bytes:
        container.seek(start)
        return container.read(length)

    try:
        archive = read_archive(read, container.seek(0, io.SEEK_END))
    except ValueError as error:
        raise ValueError(f"not a readable torch.save container ({error})") from error
    tensor = _tensor_of(archive.pickle)
    if set(archive.storages) != {"0"}:
        raise ValueError("the container does not hold a plain tensor")
    storage = archive.storages["0"]
    if tensor.nbytes != storage.nbytes:
        raise ValueError(_NOT_PLAIN)
    return Record(storage.start, storage.nbytes, storage.crc, tensor.dtype, tensor.shape)


_NOT_PLAIN = "the container's tensor is not one contiguous uncompressed storage"


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a whole storage, row-major."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@lru_cache(maxsize=4096)
def _tensor_of(pickled: bytes) -> _Tensor:
    """The tensor that a ``data.pkl`` describes: few differ in a checkpoint."""
    try:
        check_pickle(pickled)
        loaded = _TensorUnpickler(io.BytesIO(pickled)).load()
    except (pickle.UnpicklingError, TypeError, EOFError) as error:
        raise ValueError(f"its pickle is not of a tensor ({error})") from error
    if not isinstance(loaded, _Tensor):
        raise ValueError("the container does not hold a plain tensor")
    return loaded


class _TensorUnpickler(pickle.Unpickler):
    """Turns the pickle of one tensor into its description; admits the four names it needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if (module, name) == ("collections", "OrderedDict"):
            return _hooks
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a tensor's pickle")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise pickle.UnpicklingError("a reference to anything but a storage")
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or key != "0" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("more than one storage in a tensor's container")
        return _Storage(dtype, numel)


def _hooks() -> dict:
    return {}


def _parameter(data: _Tensor, requires_grad: bool, hooks: dict) -> _Tensor:
    if not isinstance(data, _Tensor) or hooks:
        raise pickle.UnpicklingError("a parameter of anything but a tensor")
    return data


def _rebuilt(
    storage: _Storage,
    offset: int,
    shape: tuple,
    stride: tuple,
    requires_grad: bool,
    hooks: dict,
    metadata: None = None,
) -> _Tensor:
    """In the place of torch's function; ``metadata`` would say that values are to be negated."""
    numbers = all(
        isinstance(one, tuple) and set(map(type, one)) <= {int} for one in (shape, stride)
    )
    if not isinstance(storage, _Storage) or not numbers or hooks or metadata:
        raise pickle.UnpicklingError("a tensor of an unknown kind")
    if offset != 0 or not _is_contiguous(shape, stride) or storage.numel != prod(shape):
        raise ValueError(_NOT_PLAIN)
    return _Tensor(storage.dtype, shape)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """As torch sees it: the stride of an axis of one element means nothing."""
    if len(shape) != len(stride) or any(size < 0 for size in shape):
        return False
    row_major = zip(shape, stride, _contiguous_stride(shape), strict=True)
    return prod(shape) == 0 or all(size == 1 or a == b for size, a, b in row_major)


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
