"""``torch.save`` objects read without importing or calling what they refer to, and written back.

Containers, namespaces, dtypes and tensors become the real thing; see :mod:`.inert` for the rest.
What was read is written to the same bytes again, in whatever process.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import types
from collections.abc import Collection
from typing import Any

import torch

from wsm_megatron.errors import MergeError
from wsm_megatron.safe_pickle.archive import Archive, check_archive
from wsm_megatron.safe_pickle.opaque import CALLED, NAMES, REAL, GlobalName, OpaqueObject, is_known
from wsm_megatron.safe_pickle.scan import MAX_ODD_KEYS, check_pickle


def load_object(data: bytes, where: str) -> Any:
    """Read one ``torch.save`` archive; ``where`` names it in messages. Tensors come on the CPU.

    A class or function that is not real stays a name, whatever it is.

    Raises:
        MergeError: a damaged archive, or a pickle that does what no saved object does.
    """
    try:
        archive = check_archive(data)
        check_pickle(archive.pickle)
        return _Unpickler(archive, data, where).load()
    except MergeError:
        raise
    except Exception as error:  # damaged bytes can raise anything at all
        reason = " ".join(f"{type(error).__name__}: {error}"[:500].split())
        raise MergeError(f"{where}: not a sound torch.save archive ({reason})") from error


def dump_object(obj: Any) -> bytes:
    """Write what :func:`load_object` read, changed or not, as one ``torch.save`` archive.

    Raises ``MergeError`` for an object of a class outside the known packages.
    """
    stream = io.BytesIO()
    module = types.SimpleNamespace(__name__=__name__, Pickler=_Pickler)
    torch.save(obj, stream, pickle_module=module)
    return stream.getvalue()


_PythonUnpickler: Any = pickle._Unpickler
_PythonPickler: Any = pickle._Pickler
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_WITH_ATTRIBUTES = (argparse.Namespace, types.SimpleNamespace, collections.OrderedDict)


class _Unpickler(_PythonUnpickler):
    """Python's own unpickler in Python, with every opcode that makes objects replaced."""

    dispatch = dict(_PythonUnpickler.dispatch)

    def __init__(self, archive: Archive, data: bytes, where: str) -> None:
        self._archive, self._data, self._where = archive, data, where
        self._storages: dict[str, torch.TypedStorage] = {}
        self._slow_keys = 0
        super().__init__(io.BytesIO(archive.pickle))

    def find_class(self, module: str, name: str) -> Any:
        in_protocol_2 = GlobalName({"builtins": "__builtin__"}.get(module, module), name)
        return REAL.get(in_protocol_2, GlobalName(module, name))

    def persistent_load(self, pid: Any) -> torch.TypedStorage:
        """A tensor's storage; ``pid`` is ``("storage", class, record, device, elements)``."""
        kind, storage_class, key, _, numel = pid
        if kind != "storage":
            raise ValueError(f"a persistent id of kind {kind!r}")
        dtype = torch.uint8 if storage_class is torch.UntypedStorage else storage_class._dtype
        if key not in self._storages:
            self._storages[key] = self._storage(key, dtype, numel)
        return self._storages[key]

    def _storage(self, key: str, dtype: torch.dtype, numel: int) -> torch.TypedStorage:
        member = self._archive.storages[key]
        data = bytearray(self._data[member.start : member.start + member.nbytes])
        if len(data) != numel * dtype.itemsize:
            raise MergeError(f"{self._where}: {len(data)} bytes for {numel} elements of {dtype}")
        tensor = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
        storage = tensor.untyped_storage()
        return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def load_setitem(self) -> None:
        self._count_slow_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._count_slow_keys(self.stack[::2])
        super().load_setitems()

    def _count_slow_keys(self, keys: Collection[Any]) -> None:
        """OpaqueObject keys are compared in Python; a file can make their hashes equal."""
        self._slow_keys += sum(isinstance(key, OpaqueObject) for key in keys)
        if self._slow_keys > MAX_ODD_KEYS:
            self._refuse("more keys of other classes than any checkpoint")

    def load_reduce(self) -> None:
        args = self._arguments()
        called = self.stack[-1]
        if isinstance(called, GlobalName):
            self.stack[-1] = OpaqueObject(called, args)
        elif isinstance(called, (type, *_FUNCTIONS)) and called in CALLED:
            if called in (set, frozenset):
                self._count_slow_keys(args[0])
            self.stack[-1] = CALLED[called](*args)
        else:
            self._refuse(f"a call of {called!r}")

    def load_newobj(self) -> None:
        args = self._arguments()
        made = self.stack[-1]
        if isinstance(made, GlobalName):
            self.stack[-1] = OpaqueObject(made, args, new=True)
        elif made is argparse.Namespace and not args:
            self.stack[-1] = argparse.Namespace()
        else:
            self._refuse(f"a new object of {made!r}")

    def load_build(self) -> None:
        state = self.stack.pop()
        built = self.stack[-1]
        if isinstance(built, OpaqueObject) and built.state is None:
            built.state = state
        elif isinstance(built, _WITH_ATTRIBUTES) and isinstance(state, dict):
            vars(built).update(state)
        else:
            self._refuse(f"a state for {type(built).__name__}")

    def _arguments(self) -> tuple[Any, ...]:
        args = self.stack.pop()
        if not isinstance(args, tuple):
            self._refuse(f"a {type(args).__name__} for arguments")
        return args

    def _refuse(self, what: str) -> None:
        raise MergeError(f"{self._where}: its pickle contains {what[:200]}; refused")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


class _Pickler(_PythonPickler):
    """Python's own pickler in Python: the one in C imports every name that it writes."""

    dispatch = dict(_PythonPickler.dispatch)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj not in NAMES:
            raise MergeError(f"cannot write {obj!r} into a checkpoint: not a class it may refer to")
        self._write_reference(obj, NAMES[obj])

    def save_reference(self, obj: GlobalName) -> None:
        if not is_known(obj):
            raise MergeError(f"cannot write a reference to {obj} into a checkpoint")
        self._write_reference(obj, obj)

    def save_set(self, obj: Any) -> None:
        """In an order of their own: that of a set depends on the process."""
        items = sorted(obj, key=lambda item: (type(item).__name__, repr(item)))
        self.save_reduce(type(obj), (items,), obj=obj)

    def save_inert(self, obj: OpaqueObject) -> None:
        self.save(obj.reference)
        self.save(obj.args)
        self.write(pickle.NEWOBJ if obj.new else pickle.REDUCE)
        self.memoize(obj)
        for item in obj.items:
            self.save(item)
            self.write(pickle.APPEND)
        for key, value in obj.pairs:
            self.save(key)
            self.save(value)
            self.write(pickle.SETITEM)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def _write_reference(self, obj: Any, reference: GlobalName) -> None:
        # Identifiers, known ones: nothing in them could be read as further opcodes.
        self.write(pickle.GLOBAL + f"{reference.module}\n{reference.name}\n".encode("ascii"))
        self.memoize(obj)

    dispatch[types.FunctionType] = save_global
    dispatch[set] = dispatch[frozenset] = save_set
    dispatch[GlobalName] = save_reference
    dispatch[OpaqueObject] = save_inert
