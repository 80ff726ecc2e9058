"""``torch.save`` objects read without importing or calling what they refer to, and written back.

Containers, namespaces, dtypes and tensors become the real thing; see :mod:`.inert` for the rest.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import collections
import io
import pickle
import types
import zipfile
from typing import Any

import torch

from wsm_megatron.checkpoint.inert import CALLED, NAMES, REAL, Inert, Reference, is_known
from wsm_megatron.errors import MergeError


def load_object(data: bytes, where: str) -> Any:
    """Read one ``torch.save`` archive; ``where`` names it in messages. Tensors come on the CPU.

    Raises:
        MergeError: a damaged archive, a reference outside the known packages, or a pickle that
            does what no saved object does.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _Unpickler(archive, where).load()
    except MergeError:
        raise
    except Exception as error:  # damaged bytes can raise anything at all
        reason = f"{type(error).__name__}: {error}"
        raise MergeError(f"{where}: not a sound torch.save archive ({reason})") from error


def dump_object(obj: Any) -> bytes:
    """Write what :func:`load_object` read, changed or not, as one ``torch.save`` archive.

    Raises ``MergeError`` for an object of a class that :func:`load_object` would not admit.
    """
    stream = io.BytesIO()
    module = types.SimpleNamespace(__name__=__name__, Pickler=_Pickler)
    torch.save(obj, stream, pickle_module=module)
    return stream.getvalue()


_PythonUnpickler: Any = pickle._Unpickler
_PythonPickler: Any = pickle._Pickler
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_WITH_ATTRIBUTES = (argparse.Namespace, types.SimpleNamespace, collections.OrderedDict)


def _modern(reference: Reference) -> Reference:
    """The name for a message: protocol 2 writes the standard library's as in Python 2."""
    module, name = reference.module, reference.name
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return Reference(_compat_pickle.IMPORT_MAPPING.get(module, module), name)


class _Unpickler(_PythonUnpickler):
    """Python's own unpickler in Python, with every opcode that makes objects replaced."""

    dispatch = dict(_PythonUnpickler.dispatch)

    def __init__(self, archive: zipfile.ZipFile, where: str) -> None:
        self._archive, self._where = archive, where
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise MergeError(f"{where}: a zip archive without the data.pkl of torch.save")
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, torch.TypedStorage] = {}
        super().__init__(io.BytesIO(archive.read(pickles[0])))

    def find_class(self, module: str, name: str) -> Any:
        reference = Reference(module, name)
        in_protocol_2 = Reference({"builtins": "__builtin__"}.get(module, module), name)
        if in_protocol_2 in REAL:
            return REAL[in_protocol_2]
        if not is_known(reference):
            raise MergeError(
                f"{self._where}: refers to {_modern(reference)}, which no Megatron checkpoint "
                "needs; refused, and nothing in it was run"
            )
        return reference

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
        data = bytearray(self._archive.read(f"{self._root}data/{key}"))
        if len(data) != numel * dtype.itemsize:
            raise MergeError(f"{self._where}: {len(data)} bytes for {numel} elements of {dtype}")
        tensor = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
        storage = tensor.untyped_storage()
        return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        called = self.stack[-1]
        if isinstance(called, Reference):
            self.stack[-1] = Inert(called, tuple(args))
        elif isinstance(called, (type, *_FUNCTIONS)) and called in CALLED:
            self.stack[-1] = CALLED[called](*args)
        else:
            self._refuse(f"a call of {called!r}")

    def load_newobj(self) -> None:
        args = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Reference):
            self.stack[-1] = Inert(made, tuple(args), new=True)
        elif made is argparse.Namespace and not args:
            self.stack[-1] = argparse.Namespace()
        else:
            self._refuse(f"a new object of {made!r}")

    def load_build(self) -> None:
        state = self.stack.pop()
        built = self.stack[-1]
        if isinstance(built, Inert) and built.state is None:
            built.state = state
        elif isinstance(built, _WITH_ATTRIBUTES) and isinstance(state, dict):
            vars(built).update(state)
        else:
            self._refuse(f"a state for {type(built).__name__}")

    def load_other(self) -> None:
        self._refuse("an opcode that torch.save does not use")

    def _refuse(self, what: str) -> None:
        raise MergeError(f"{self._where}: its pickle contains {what[:200]}; refused")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _opcode in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID):
        dispatch[_opcode[0]] = load_other
    for _opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_opcode[0]] = load_other


class _Pickler(_PythonPickler):
    """Python's own pickler in Python: the one in C imports every name that it writes."""

    dispatch = dict(_PythonPickler.dispatch)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj not in NAMES:
            raise MergeError(f"cannot write {obj!r} into a checkpoint: not a class it may refer to")
        self._write_reference(obj, NAMES[obj])

    def save_reference(self, obj: Reference) -> None:
        self._write_reference(obj, obj)

    def save_inert(self, obj: Inert) -> None:
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

    def _write_reference(self, obj: Any, reference: Reference) -> None:
        assert is_known(reference) or reference in REAL  # identifiers: nothing to inject
        self.write(pickle.GLOBAL + f"{reference.module}\n{reference.name}\n".encode("ascii"))
        self.memoize(obj)

    dispatch[types.FunctionType] = save_global
    dispatch[Reference] = save_reference
    dispatch[Inert] = save_inert
