"""What becomes of classes that a pickle refers to: real or opaque; opaque ones known or foreign.

Megatron's common state holds instances of Megatron's own classes (enums in ``args``, mostly) and
sometimes of the user's. Here such a class is a :class:`GlobalName`, its name and nothing else, and
an instance an :class:`OpaqueObject`: what the pickle would have called, recorded instead. Nothing
is imported or called for either, and what is foreign is not written into a checkpoint.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import codecs
import collections
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._utils

_KNOWN_PACKAGES = {"apex", "megatron", "modelopt", "torch", "transformer_engine"}
_BUILTINS = {
    *("bool", "bytearray", "complex", "dict", "float", "int"),
    *("list", "range", "slice", "str", "tuple"),
}
_KNOWN_NAMES = {
    "_io": {"BytesIO"},
    "__builtin__": _BUILTINS | {"long", "unicode", "xrange"},
    "builtins": _BUILTINS,
    "collections": {"Counter", "defaultdict", "deque"},
    "datetime": {"date", "datetime", "timedelta", "timezone"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "signal": {"Signals"},
}


@dataclass(frozen=True)
class GlobalName:
    """The name of a class or function, as a pickle gives it. Nothing was imported for it."""

    module: str
    name: str

    def __str__(self) -> str:
        """For messages: on a line, and as Python 3 has it where protocol 2 writes Python 2's."""
        pair = self.module, self.name
        module, name = _compat_pickle.NAME_MAPPING.get(pair, pair)
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        return ascii(f"{module}.{name}")[1:-1][:200]


@dataclass
class OpaqueObject:
    """An object of a :class:`GlobalName`: the call that would make it, and its state.

    Attributes:
        reference: what a real unpickler would call.
        args: with which arguments.
        new: whether through ``reference.__new__`` (pickle's NEWOBJ) or as a call (REDUCE).
        state: what would be given to ``__setstate__`` or ``__dict__``; None for nothing.
        items: what would be appended to it, for list-likes.
        pairs: what would be set in it, for dict-likes.
    """

    reference: GlobalName
    args: tuple[Any, ...]
    new: bool = False
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def __hash__(self) -> int:  # enum members are dict keys
        return hash((self.reference, _frozen(self.args), _frozen(self.state)))

    # What the unpickler does to list-likes and dict-likes.
    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))


def _frozen(value: Any) -> Any:
    """Something hashable, equal for equal values."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return frozenset((_frozen(key), _frozen(held)) for key, held in value.items())
    return (
        value
        if isinstance(value, (GlobalName, OpaqueObject, str, bytes, int, float))
        else type(value)
    )


def references(value: Any) -> Iterator[GlobalName]:
    """Every inert class and function in a value, keys included."""
    if isinstance(value, GlobalName):
        yield value
    elif isinstance(value, OpaqueObject):
        yield value.reference
        yield from references([value.args, value.state, value.items, value.pairs])
    elif isinstance(value, Mapping):
        yield from references(list(value.items()))
    elif isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        yield from references(vars(value))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from references(item)


def _empty_bytes() -> bytes:
    return b""


def _empty(kind: type) -> Callable[[], Any]:
    """Makes one of ``kind`` with nothing in it, as such are pickled: they are filled later."""
    return lambda: kind()


def _collected(kind: type) -> Callable[[list], Any]:
    """Makes a set of what may be hashed: a deep tuple would overflow the stack."""

    def collect(items: list) -> Any:
        for item in items:
            parts = item if isinstance(item, tuple) else (item,)
            if any(isinstance(part, (tuple, frozenset)) for part in parts):
                raise ValueError("a container in a set")
        return kind(items)

    return collect


def _tensor(
    storage: torch.TypedStorage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: dict | None = None,
    metadata: dict | None = None,
) -> torch.Tensor:
    """In the place of torch's function, which would enlarge a storage that is too small."""
    if hooks or metadata or len(size) != len(stride):
        raise ValueError("a tensor of an unknown kind")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= storage._size()):
        raise ValueError("a tensor that is larger than its storage")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, {})


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes, as pickle protocol 2 spells them: ``_codecs.encode(text, "latin1")``."""
    if encoding != "latin1":
        raise ValueError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _is_storage_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.storage._LegacyStorage)


REAL: dict[GlobalName, Any] = {
    GlobalName("argparse", "Namespace"): argparse.Namespace,
    GlobalName("types", "SimpleNamespace"): types.SimpleNamespace,
    GlobalName("collections", "OrderedDict"): collections.OrderedDict,
    GlobalName("__builtin__", "set"): set,
    GlobalName("__builtin__", "frozenset"): frozenset,
    GlobalName("__builtin__", "bytes"): bytes,
    GlobalName("_codecs", "encode"): codecs.encode,
    GlobalName("torch", "Size"): torch.Size,
    GlobalName("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    GlobalName("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    **{
        GlobalName("torch", n): v
        for n, v in vars(torch).items()
        if isinstance(v, torch.dtype) or _is_storage_class(v)
    },
}
"""What a pickle gets for real, by the names of protocol 2 (Python 2's, for builtins)."""

NAMES = {value: reference for reference, value in reversed(REAL.items())} | {
    v: GlobalName("torch", str(v).removeprefix("torch."))
    for v in REAL.values()
    if isinstance(v, torch.dtype)  # which have aliases: torch.float is torch.float32
}
"""The reference under which each of :data:`REAL` is written."""

CALLED: dict[Any, Callable[..., Any]] = {
    types.SimpleNamespace: _empty(types.SimpleNamespace),
    collections.OrderedDict: _empty(collections.OrderedDict),
    set: _collected(set),
    frozenset: _collected(frozenset),
    bytes: _empty_bytes,
    codecs.encode: _latin1,
    torch.Size: torch.Size,
    torch._utils._rebuild_tensor_v2: _tensor,
}
"""What a pickle may call, and what is called for it."""


def is_known(reference: GlobalName) -> bool:
    """Whether a reference may be written into a checkpoint: one into a known package."""
    parts = [*reference.module.split("."), *reference.name.split(".")]
    if not all(part.isidentifier() and part.isascii() for part in parts):
        return False
    # A dotted name may be a nested class; through anything else it could walk into other modules.
    if not all(part.lstrip("_")[:1].isupper() for part in reference.name.split(".")[:-1]):
        return False
    known = _KNOWN_NAMES.get(reference.module, set())
    return reference.name in known or reference.module.partition(".")[0] in _KNOWN_PACKAGES
