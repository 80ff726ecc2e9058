"""Where a merged checkpoint comes from: ``wsm_merge.json``, and the same in its common state."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.layout import PROVENANCE_FILE, is_complete
from wsm_megatron.checkpoint.reader import read_file
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import MergeError
from wsm_megatron.planning.sources import Source
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint
from wsm_megatron.storage.json_file import parse_json
from wsm_megatron.version import __version__

FORMAT = 2
"""From 2 on every file of the checkpoint is listed, and the last field is a CRC-32 of the rest."""
AVERAGED = frozenset({"mean", "moving_average"})
"""By these a source of a merge inside a run says that it is no checkpoint, but an average over the
steps up to its iteration."""
_UNSEALED = 1
_SEAL = "crc32"
_DATE = "date"
_PARTS = {"iteration": int, "sources": list, "coefficients": list, "options": dict, "files": dict}


def describe(
    sources: Sequence[dict[str, Any]], decay: MergeCoefficients, config: MergeConfig, iteration: int
) -> dict[str, Any]:
    """Plain JSON types; no time and no host, so that equal merges say the same.

    Args:
        sources: at least ``iteration`` and ``tokens`` of each, oldest first.
        config: the merge, or the one that a merge inside a run is equal to.
    """
    return {
        "format": FORMAT,
        "iteration": iteration,
        "sources": list(sources),
        "positions": list(decay.positions),
        "unit": decay.unit,
        "coefficients": list(decay.coefficients),
        "effective_lr": list(decay.effective_lr),
        "options": config.recorded(),
        "versions": {
            "wsm_megatron": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def describe_source(source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    """One source of an offline merge, and where it lies in the merge's window."""
    return {
        "path": str(source.path.resolve()),
        "iteration": source.iteration,
        "tokens": checkpoint.tokens,
        "metadata_crc32": f"{source.metadata_crc:08x}",
    }


def write_provenance(
    directory: Path, provenance: dict[str, Any], files: dict[str, tuple[int, int]]
) -> None:
    """Write ``wsm_merge.json``: the description, the day, and all files of the checkpoint.

    Args:
        files: size and CRC-32 by path within the directory, of every file but this one.
    """
    dated = {**provenance, _DATE: today(), "files": listed(files)}
    write_file(directory / PROVENANCE_FILE, seal(dated))


def today() -> str:
    """The day in UTC, or that of ``SOURCE_DATE_EPOCH`` (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = time.time() if epoch is None else int(epoch)
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def listed(files: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """Size and CRC-32 of files by name, as a record of them has it."""
    return {
        name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sorted(files.items())
    }


def seal(contents: dict[str, Any]) -> bytes:
    """``wsm_merge.json`` with these contents, and a last field by which any damage shows."""
    crc = crc32(_text(contents))
    return _text({**contents, _SEAL: f"{crc:08x}"})


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """A merged checkpoint's provenance; None for an ordinary checkpoint.

    Every byte is checked, except in format 1, which had nothing to check it by.

    Raises:
        MergeError: the file is damaged.
    """
    path = directory / PROVENANCE_FILE
    if not path.is_file():
        return None
    data = read_file(path)
    try:
        contents = parse_json(data)
    except ValueError as error:
        raise MergeError(f"{path}: damaged: {error}") from error
    if not isinstance(contents, dict) or contents.get("format") not in (_UNSEALED, FORMAT):
        raise MergeError(f"{path}: damaged, or written by another version of wsm_megatron")
    sealed = contents.pop(_SEAL, None) is not None
    if sealed != is_sealed(contents) or (sealed and seal(contents) != data):
        raise MergeError(f"{path}: damaged: it is not what the merge wrote, by its own CRC-32")
    _check_parts(path, contents)
    return contents


def is_sealed(provenance: dict[str, Any]) -> bool:
    """Whether it lists every file of its checkpoint, and was itself checked when it was read."""
    return provenance["format"] != _UNSEALED


def described(provenance: dict[str, Any]) -> dict[str, Any]:
    """What :func:`describe` gave, which the common state repeats: all but the day and the files."""
    return {name: value for name, value in provenance.items() if name not in (_DATE, "files")}


def holds_merge(directory: Path, provenance: dict[str, Any]) -> bool:
    """Whether a directory holds the merge described, whole by the sizes of its files."""
    found = read_provenance(directory)
    if found is None or not is_complete(directory):
        return False
    same_merge = json.loads(_text(provenance)) | {"format": found["format"]} == described(found)
    return same_merge and holds_files(directory, found["files"])


def holds_files(directory: Path, files: Mapping[str, dict[str, Any]]) -> bool:
    """Whether listed files are in a directory, each of its size."""
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == said["bytes"]
        for name, said in files.items()
    )


def _text(contents: dict[str, Any]) -> bytes:
    return (json.dumps(contents, indent=2) + "\n").encode()


def _check_parts(path: Path, contents: dict[str, Any]) -> None:
    """What the rest of the package relies on is there."""
    wrong = [name for name, kind in _PARTS.items() if not isinstance(contents.get(name), kind)]
    if not wrong:
        files, sources = contents["files"].values(), contents["sources"]
        if not all(isinstance(f, dict) and {"bytes", "crc32"} <= f.keys() for f in files):
            wrong.append("files")
        if not all(isinstance(s, dict) and isinstance(s.get("iteration"), int) for s in sources):
            wrong.append("sources")
    if wrong:
        raise MergeError(f"{path}: damaged: {', '.join(wrong)} missing or of another kind")
