"""The formats that Megatron saves checkpoints in, and what differs between them.

| ``--ckpt-format`` | written last | common state | optimizer state is keyed |
|---|---|---|---|
| ``torch_dist``, up to 0.18 | ``metadata.json`` | ``common.pt`` | by model key, or flat buckets |
| ``torch_dist``, from 0.19 on | ``metadata.json`` | entry ``common_state/shard_0_1`` | the same |
| ``fsdp_dtensor`` (Megatron FSDP) | ``.metadata`` | an entry for every value | by param name |
| ``torch_dcp`` (torch FSDP2) | ``.metadata`` | an entry for every value | by number |

A new format goes here: a class with the members of :class:`CheckpointFormat`, asked for in
:func:`format_of`. Within this package optimizer state has the keys of ``torch_dist``
(``optimizer.state.NAME.MODEL_KEY``), whatever the format calls it on disk.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from wsm_megatron.checkpoint.keys import MERGEABLE, Role, object_role, tensor_role
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.safe_pickle.objects import dump_object, load_object
from wsm_megatron.storage.retry import with_retries

METADATA_FILE = ".metadata"
MARKER_FILE = "metadata.json"
COMMON_FILE = "common.pt"
COMMON_KEY = "common_state/shard_0_1"
"""Where the common state is from Megatron 0.19 on (``save`` in dist_checkpointing)."""
PROVENANCE_KEY = "wsm_merge"
"""Where a merged checkpoint's common state says how it was made. Megatron's ``load_checkpoint``
reads the loaded state by key and passes over keys that it does not know."""

KeyPath = tuple[str | int, ...]
"""Where in Megatron's nested state dict an entry is."""
CommonEntries = Mapping[KeyPath, bytes]
"""A common state as an entry for every value."""


@dataclass(frozen=True)
class StoredCommon:
    """A common state as a format stores it.

    Attributes:
        file: contents of ``common.pt``; None where there is none.
        entries: byte entries, by their key.
        paths: where in Megatron's nested state dict each of them is, if it has a place there.
    """

    file: bytes | None
    entries: Mapping[str, bytes] = field(default_factory=dict)
    paths: Mapping[str, KeyPath] = field(default_factory=dict)

    @property
    def nbytes_beside(self) -> int:
        """Bytes outside the ``.distcp`` files."""
        return len(self.file or b"")


class CheckpointFormat(Protocol):
    """What a merge has to know of a format. There is one instance of each, in this process and,
    by name, in a pickle.

    Attributes:
        name: as ``--ckpt-format`` has it.
        finished_by: the file that is written last.
        container: where the common state is.
        readers: which Megatron reads it.
        optimizer_layout: what resumes are told of its optimizer state; None where that depends.
        loads_weights_alone: Megatron's load can do without optimizer state.
        weights_alone: what to know of merges without optimizer state; empty for nothing.
        model_is_main: model entries are the main params, there are no others.
        notes: what to know before a resume.
    """

    @property
    def name(self) -> str: ...
    @property
    def finished_by(self) -> str: ...
    @property
    def container(self) -> str: ...
    @property
    def readers(self) -> str: ...
    @property
    def optimizer_layout(self) -> str | None: ...
    @property
    def loads_weights_alone(self) -> bool: ...
    @property
    def weights_alone(self) -> str: ...
    @property
    def model_is_main(self) -> bool: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def key(self, stored: str, keys: Container[str]) -> str:
        """The key that an entry has within this package.

        Args:
            keys: of all entries, as stored.
        """
        ...

    def tensor_role(
        self, key: str, dtype: torch.dtype, shape: tuple[int, ...], model: tuple[int, ...] | None
    ) -> Role:
        """Role of a tensor. ``model``: shape of the model tensor that optimizer state is of."""
        ...

    def object_role(self, key: str) -> Role:
        """Role of a byte entry."""
        ...

    def store(self, state: Mapping[str, Any]) -> StoredCommon:
        """A common state as it is stored."""
        ...

    def marker(self, marker: Mapping[str, Any]) -> dict[str, Any] | None:
        """``metadata.json``, from that of another checkpoint; None where there is none."""
        ...

    def converted(self, wanted: str) -> CheckpointFormat:
        """The format that ``--format`` asks for. Raises ``ValueError`` where it cannot be."""
        ...


class TorchDist:
    """``torch_dist``, with the common state in ``common.pt`` or, from core 0.19 on, in an entry."""

    name = "torch_dist"
    finished_by = MARKER_FILE
    optimizer_layout = None
    loads_weights_alone = True
    weights_alone = ""
    model_is_main = False
    notes = ()
    _COMMON_BACKEND = {"common_backend": "torch", "common_backend_version": 1}

    def __init__(self, in_distcp: bool) -> None:
        self.in_distcp = in_distcp
        self.container = "common_state entry" if in_distcp else "common.pt"
        self.readers = "core 0.19 and later" if in_distcp else "core 0.14 and later"

    def __reduce__(self) -> str:
        return "TORCH_DIST_019" if self.in_distcp else "TORCH_DIST_016"

    def key(self, stored: str, keys: Container[str]) -> str:
        return stored

    def tensor_role(
        self, key: str, dtype: torch.dtype, shape: tuple[int, ...], model: tuple[int, ...] | None
    ) -> Role:
        return tensor_role(key, dtype)

    def object_role(self, key: str) -> Role:
        return object_role(key)

    def store(self, state: Mapping[str, Any]) -> StoredCommon:
        if self.in_distcp:
            return StoredCommon(None, {COMMON_KEY: dump_object([dict(state)])})
        return StoredCommon(dump_object(dict(state)))

    def marker(self, marker: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in marker.items() if key not in self._COMMON_BACKEND}
        return kept if self.in_distcp else {**kept, **self._COMMON_BACKEND}

    def converted(self, wanted: str) -> CheckpointFormat:
        return {"0.16": TORCH_DIST_016, "0.19": TORCH_DIST_019}.get(wanted, self)


class _Dcp:
    """What ``torch.distributed.checkpoint.save`` makes of the nested dict that Megatron's
    ``generate_state_dict`` returns: an entry for every leaf, keys joined with dots."""

    finished_by = METADATA_FILE
    container = "an entry for every value"

    name: str
    readers: str
    loads_weights_alone = True
    weights_alone = ""
    model_is_main = False
    notes: tuple[str, ...] = ()

    def __reduce__(self) -> str:
        return self.name.upper()

    @property
    def optimizer_layout(self) -> str:
        return self.name

    def key(self, stored: str, keys: Container[str]) -> str:
        raise NotImplementedError

    def tensor_role(
        self, key: str, dtype: torch.dtype, shape: tuple[int, ...], model: tuple[int, ...] | None
    ) -> Role:
        part = _part(key)
        if part == "rng_state":
            return Role.RNG
        if part == "model":
            return tensor_role(key, dtype)
        if part != "optimizer":
            return Role.UNKNOWN if dtype.is_floating_point or dtype.is_complex else Role.COPY
        if _MAIN.fullmatch(key):
            return Role.MAIN if dtype in MERGEABLE else Role.UNKNOWN
        if _MOMENT.fullmatch(key) and dtype in MERGEABLE and shape and model in (None, shape):
            return Role.MOMENT
        return Role.OPTIMIZER if _STATE.match(key) else Role.UNKNOWN

    def object_role(self, key: str) -> Role:
        part = _part(key)
        if part == "model":
            return Role.EXTRA if key.endswith("._extra_state") else Role.UNKNOWN
        roles = {"optimizer": Role.OPTIMIZER, "rng_state": Role.RNG}
        return roles.get(part, Role.COPY if part.startswith("rerun_state_machine") else Role.COMMON)

    def store(self, state: Mapping[str, Any]) -> StoredCommon:
        leaves = {".".join(map(str, path)): (path, value) for path, value in _leaves(state)}
        return StoredCommon(
            None,
            {key: dump_object(value) for key, (_, value) in leaves.items()},
            {key: path for key, (path, _) in leaves.items()},
        )

    def marker(self, marker: Mapping[str, Any]) -> None:
        return None

    def converted(self, wanted: str) -> CheckpointFormat:
        if wanted == "same":
            return self
        raise UsageError(
            f"--format {wanted}: the sources are of {self.name}, and a merge of them is too; load "
            "it in Megatron to save it otherwise"
        )


class FsdpDtensor(_Dcp):
    """Megatron FSDP: model entries are the main weights; optimizer state is keyed by param name.

    ``_param_name`` of the distributed optimizer gives a param's name below three wrappers, the
    model's state dict its name below one.
    """

    name = "fsdp_dtensor"
    readers = "core 0.16 and later, with --use-megatron-fsdp"
    model_is_main = True
    weights_alone = (
        "main of August 2026 loads no weights alone into Megatron FSDP (--no-load-optim and "
        "--finetune stop with NotImplementedError; core_v0.16.1 loads them)"
    )
    notes = (weights_alone,)

    def key(self, stored: str, keys: Container[str]) -> str:
        found = _FSDP_STATE.fullmatch(stored)
        if found is None:
            return stored
        chain, param, name = found.groups()
        chunks = ("model", *(f"model{i}" for i in range(_MOST_CHUNKS)))
        for model in (f"{chunk}.module.{param}" for chunk in chunks):
            if model in keys:
                return f"{_chain(chain)}optimizer.state.{name}.{model}"
        return stored


class TorchDcp(_Dcp):
    """torch FSDP2: optimizer state is keyed by number; :mod:`.indexed_state` finds the model keys.

    Main params are ``optimizer.fp32_from_fp16_params.GROUP.NUMBER``, an optimizer's own state
    ``optimizer.optimizer.state.NUMBER.NAME``, or, in fp32, ``optimizer.state.NUMBER.NAME``.
    """

    name = "torch_dcp"
    readers = "core 0.16 and later, with --use-torch-fsdp2"
    loads_weights_alone = False
    weights_alone = (
        "Megatron's load of torch_dcp asks for optimizer and RNG states whatever the flags: the "
        "weights alone load with torch.distributed.checkpoint"
    )
    notes = (
        "core_v0.16.1 and main of August 2026 load no torch_dcp checkpoint, their own neither: "
        "load_checkpoint calls ChainedOptimizer.state_dict(is_loading=True), which takes no such "
        "argument; with that mended they load it",
    )

    def key(self, stored: str, keys: Container[str]) -> str:
        fp32 = re.fullmatch(r"optimizer\.((?:\d+\.)?)(state\.\d+\..+)", stored)
        return f"optimizer.{fp32[1]}optimizer.{fp32[2]}" if fp32 else stored


TORCH_DIST_016 = TorchDist(in_distcp=False)
TORCH_DIST_019 = TorchDist(in_distcp=True)
FSDP_DTENSOR, TORCH_DCP = FsdpDtensor(), TorchDcp()

_MOST_CHUNKS = 64
"""Virtual pipeline stages of a rank that a param is looked for in."""
_FSDP_STATE = re.compile(r"optimizer\.((?:chained_)?\d+\.)?state\.(?:module\.){3}(.+)\.([^.]+)")
_INDEXED_MAIN = r"optimizer\.(?:\d+\.)?fp32_from_fp16_params\.\d+\.\d+"
_KEYED = r"(?:chained_\d+\.)?optimizer\.state"
_MAIN = re.compile(rf"{_INDEXED_MAIN}|{_KEYED}\.fp32_param\..+")
_MOMENT = re.compile(
    rf"optimizer\.(?:\d+\.)?optimizer\.state\.\d+\.[^.]+|{_KEYED}\.(?!fp32_param\.)[^.]+\.model.*"
)
_STATE = re.compile(rf"optimizer\.(?:\d+\.)?(?:optimizer|fp32_from_fp16_params)\.|{_KEYED}\.")

# Strings as pickles of protocol 4 and of protocol 2 begin them, with their length.
_ITERATION = re.compile(rb"(?:\x8c\x09|X\x09\x00\x00\x00)iteration")
_MODEL = re.compile(rb"(?:\x8c.|X.{4})model\d*\.", re.DOTALL)


def format_of(keys: Iterable[str], has_marker: bool) -> CheckpointFormat | None:
    """The format of a finished checkpoint with these entries; None for what is none.

    Args:
        has_marker: there is a ``metadata.json``, which says ``torch_dist``.
    """
    keys = set(keys)
    if has_marker:
        return TORCH_DIST_019 if COMMON_KEY in keys else TORCH_DIST_016
    if "iteration" not in keys:
        return None
    models = [key for key in keys if _part(key) == "model"]
    if any(re.match(r"model\d*\.module\.", key) for key in models):
        return FSDP_DTENSOR
    return TORCH_DCP if models else None


def finishing_file(path: Path) -> str | None:
    """The file by which a checkpoint is finished, which its format writes last; None where none is.

    ``.metadata`` finishes a checkpoint whose common state is in it, which ``torch_dist`` never
    does: there it is written last but one, and alone means an unfinished checkpoint. Its bytes are
    looked through for that, not read as a pickle, which takes seconds for a large one.
    """
    if (path / MARKER_FILE).is_file():
        return MARKER_FILE
    metadata = path / METADATA_FILE
    if not metadata.is_file():
        return None
    data = with_retries(metadata.read_bytes, lambda: f"{metadata}: reading")
    return METADATA_FILE if _ITERATION.search(data) and _MODEL.search(data) else None


def nested(entries: CommonEntries, where: str) -> dict[str, Any]:
    """The nested dict of values that are stored apart. Raises ``MergeError`` for damage."""
    state: dict[str, Any] = {}
    for (*above, last), data in entries.items():
        inner: Any = state
        for part in above:
            inner = inner.setdefault(str(part), {})
            if not isinstance(inner, dict):
                raise MergeError(f"{where}: {part} is a value and holds others; it is damaged")
        inner[str(last)] = load_object(data, f"{where}: {last}")
    return state


def _leaves(state: Mapping[str, Any], above: KeyPath = ()) -> Iterable[tuple[KeyPath, Any]]:
    """As torch flattens a dict; what this tool adds stays in one piece."""
    for key, value in state.items():
        path = (*above, key)
        if isinstance(value, Mapping) and path != (PROVENANCE_KEY,):
            yield from _leaves(value, path)
        else:
            yield path, value


def _part(key: str) -> str:
    """The part of the state that an entry is of: ``model`` for every chunk of the model."""
    first = key.partition(".")[0]
    if first.startswith("chained_"):
        return "optimizer"
    return "model" if re.fullmatch(r"model\d*", first) else first


def _chain(number: str | None) -> str:
    return f"chained_{number.removeprefix('chained_')}" if number else ""
