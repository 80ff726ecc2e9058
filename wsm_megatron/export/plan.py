"""What an export will hold, from a model's metadata and args; no tensor is read.

The model is a checkpoint's, or the one that a merge will make.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.common_state import load_common, load_stored, read_common
from wsm_megatron.checkpoint.keys import MERGEABLE, OPTIMIZER_ROLES, Role
from wsm_megatron.checkpoint.layout import METADATA_FILE, Layout, TensorEntry, read_layout
from wsm_megatron.checkpoint.reader import read_file
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import UsageError, some
from wsm_megatron.export.families import choose
from wsm_megatron.export.model_args import ModelArgs, model_args
from wsm_megatron.export.options import DTYPES, ExportConfig
from wsm_megatron.export.recorded_args import recorded_args
from wsm_megatron.export.shards import INDEX_FILE, Shard, index_of, make_shards, shares
from wsm_megatron.export.side_files import Tokenizer, model_config
from wsm_megatron.export.table import Family, Piece, Tensor, tensors_of
from wsm_megatron.planning.job import Job, OutputCheckpoint
from wsm_megatron.planning.provenance import described, read_provenance
from wsm_megatron.storage.fingerprint import Fingerprint, fingerprint
from wsm_megatron.version import __version__

FORMAT = 1
METADATA_CRC = "metadata_crc32"
"""In the record: which checkpoint it was, beside its path. An export in the same pass as its merge
is told it once that is written; one without a checkpoint has none."""
_NOT_WEIGHTS = OPTIMIZER_ROLES | {Role.RNG, Role.COMMON, Role.EXTRA}


@dataclass(frozen=True)
class Model:
    """What is exported.

    Attributes:
        where: the checkpoint that it is of, or a merge's newest source, for messages; Bridge's run
            config lies there.
        tensors: all that it has, as they are stored. format: how. state: the common state.
        source: path of the checkpoint that it is, or becomes.
        metadata_crc: of its ``.metadata``, where that is written. merge: how it was merged, if so.
    """

    where: Path
    tensors: Mapping[str, TensorEntry]
    format: str
    state: Mapping[str, Any]
    source: Path
    metadata_crc: int | None
    merge: dict[str, Any] | None


@dataclass(frozen=True)
class ExportPlan:
    """An export, before a byte of it is written.

    Attributes:
        config: ``config.json``; None where the names are Megatron's.
        record: ``wsm_export.json``, but for its files.
    """

    shards: tuple[Shard, ...]
    config: dict[str, Any] | None
    tokenizer: Tokenizer | None
    record: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def tensors(self) -> int:
        return sum(len(shard.tensors) for shard in self.shards)

    def index(self) -> dict[str, bytes]:
        """The index of several files, by its name; nothing for a single one."""
        return {INDEX_FILE: index_of(self.shards)} if len(self.shards) > 1 else {}


@dataclass(frozen=True)
class CheckpointExport(ExportPlan):
    """An export that a checkpoint is read for.

    Attributes:
        before: the checkpoint's files when it was opened.
    """

    layout: Layout
    before: Fingerprint

    def share(self, rank: int, ranks: int) -> tuple[Layout, list[Shard]]:
        """A rank's files, and as much of the layout as it reads."""
        mine = shares(self.shards, ranks)[rank]
        keys = {p.key for shard in mine for tensor in shard.tensors for p in tensor.pieces}
        tensors = {key: self.layout.tensors[key] for key in keys}
        return replace(self.layout, tensors=tensors, objects={}), mine


def make_plan(config: ExportConfig) -> CheckpointExport:
    """Open a checkpoint and plan its export.

    Raises:
        UsageError: the model is of no family here, args lack something, or a tensor has no place.
        MergeError: the checkpoint is damaged.
    """
    path = config.load
    before = fingerprint(path) if path.is_dir() else ()
    layout = read_layout(path)
    model = Model(
        where=path,
        tensors=layout.tensors,
        format=layout.format.name,
        state=load_common(*read_common(path, layout)),
        source=path.resolve(),
        metadata_crc=crc32(read_file(path / METADATA_FILE)),
        merge=_merge(path),
    )
    plan = plan_of(model, config)
    return CheckpointExport(plan.shards, plan.config, plan.tokenizer, plan.record, layout, before)


def merged_model(job: Job, output: OutputCheckpoint) -> Model:
    """What a merge will make."""
    newest = job.newest(output)
    return Model(
        where=newest.path,
        tensors={
            made.key: replace(newest.tensors[made.key], dtype=made.dtype)
            for recipe in job.plan.recipes
            for made in recipe.outputs
        },
        format=output.format.name,
        state=load_stored(output.common, str(newest.path)),
        source=output.path.resolve(),
        metadata_crc=None,
        merge=output.provenance,
    )


def plan_of(model: Model, config: ExportConfig) -> ExportPlan:
    """Plan the export of a model.

    Raises:
        UsageError: it is of no family here, args lack something, or a tensor has no place.
    """
    tokenizer = None if config.tokenizer is None else Tokenizer(config.tokenizer)
    entries, dtype = _weights(model, config), DTYPES[config.export_dtype]
    family, contents = None, None
    if config.format == "hf":
        size = None if tokenizer is None else tokenizer.size()
        recorded = recorded_args(model.where, model.state)
        args = model_args(recorded, config.arg, str(model.where), size)
        family = _family(model, args, config)
        tensors = tensors_of(family, args, entries, dtype)
        special = {} if tokenizer is None else tokenizer.special_ids()
        contents = model_config(family, args, _dtype(tensors), special)
    else:
        tensors = [_as_it_is(entry, dtype) for entry in entries.values()]
    record = {
        "format": FORMAT,
        "source": str(model.source),
        "iteration": model.state.get("iteration"),
        METADATA_CRC: None if model.metadata_crc is None else f"{model.metadata_crc:08x}",
        "family": None if family is None else family.name,
        "options": _recorded(config),
        "versions": {"wsm_megatron": __version__, "python": platform.python_version()},
        "merge": model.merge,
    }
    return ExportPlan(tuple(make_shards(tensors, config.shard_size)), contents, tokenizer, record)


def _family(model: Model, args: ModelArgs, config: ExportConfig) -> Family:
    if model.format != "torch_dist":
        raise UsageError(
            f"{model.where} is of {model.format}, whose names --format hf does not know: "
            "load it in Megatron and save it with --ckpt-format torch_dist, or use --format "
            "safetensors"
        )
    return choose(args, config.family)


def _weights(model: Model, config: ExportConfig) -> dict[str, TensorEntry]:
    """The tensors that are to be exported. Raises ``UsageError`` where one is no weights."""
    weights = {k: e for k, e in model.tensors.items() if e.role not in _NOT_WEIGHTS}
    for pattern in config.leave_out:
        if not any(fnmatchcase(key, pattern) for key in weights):
            raise UsageError(f"--leave-out {pattern!r} matches no model tensor of {model.where}")
    kept = {
        key: entry
        for key, entry in weights.items()
        if not any(fnmatchcase(key, pattern) for pattern in config.leave_out)
    }
    strange = [f"{key} ({e.dtype})" for key, e in kept.items() if e.dtype not in MERGEABLE]
    if strange:
        raise UsageError(
            f"{model.where}: {some(strange)}: no floating weights; --leave-out PATTERN leaves them "
            "out"
        )
    if not kept:
        raise UsageError(f"{model.where}: no model tensors to export")
    return kept


def _as_it_is(entry: TensorEntry, dtype: torch.dtype | None) -> Tensor:
    own = entry.dtype if dtype is None or entry.role is Role.BUFFER else dtype
    whole = Region((0,) * len(entry.shape), entry.shape)
    return Tensor(entry.key, own, entry.shape, (Piece(entry.key, whole),))


def _dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype that most elements have."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.nbytes
    return max(elements, key=lambda dtype: elements[dtype], default=None)


def _recorded(config: ExportConfig) -> dict[str, Any]:
    names = ("format", "family", "arg", "export_dtype", "leave_out", "shard_size", "tokenizer")
    values = {name: getattr(config, name) for name in names}
    return {
        name: str(value)
        if isinstance(value, Path)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in values.items()
    }


def _merge(path: Path) -> dict[str, Any] | None:
    """How the checkpoint was merged, where it was."""
    found = read_provenance(path)
    return None if found is None else described(found)
