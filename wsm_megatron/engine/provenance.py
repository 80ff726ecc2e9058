"""Where a merged checkpoint comes from: ``wsm_merge.json``, and the same in its common state."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import wsm_megatron
from wsm_megatron.checkpoint.json_file import read_json
from wsm_megatron.checkpoint.layout import is_complete
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.config import MergeConfig
from wsm_megatron.engine.publish import PROVENANCE_FILE
from wsm_megatron.engine.sources import Decay, Source
from wsm_megatron.errors import MergeError

FORMAT = 1


def describe(
    sources: Sequence[dict[str, Any]], decay: Decay, config: MergeConfig, iteration: int
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
        "options": _options(config),
        "versions": {
            "wsm_megatron": wsm_megatron.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def describe_source(source: Source) -> dict[str, Any]:
    """One source of an offline merge."""
    return {
        "path": str(source.path.resolve()),
        "iteration": source.iteration,
        "tokens": source.tokens,
        "metadata_crc32": f"{source.metadata_crc:08x}",
    }


def write_provenance(
    directory: Path, provenance: dict[str, Any], files: dict[str, tuple[int, int]]
) -> None:
    """Write ``wsm_merge.json``: the description, and size and CRC-32 of the checkpoint's files."""
    listed = {
        name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sorted(files.items())
    }
    text = json.dumps({**provenance, "files": listed}, indent=2) + "\n"
    write_file(directory / PROVENANCE_FILE, text.encode())


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """A merged checkpoint's provenance; None for an ordinary checkpoint.

    Raises:
        MergeError: the file is damaged.
    """
    path = directory / PROVENANCE_FILE
    if not path.is_file():
        return None
    provenance = read_json(path)
    if not isinstance(provenance, dict) or provenance.get("format") != FORMAT:
        raise MergeError(f"{path}: written by another version of wsm_megatron")
    return provenance


def holds_merge(directory: Path, provenance: dict[str, Any]) -> bool:
    """Whether a directory holds the merge described, whole by the sizes of its files."""
    found = read_provenance(directory)
    if found is None or not is_complete(directory):
        return False
    files = found.pop("files")
    if found != json.loads(json.dumps(provenance)):
        return False
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == listed["bytes"]
        for name, listed in files.items()
    )


def _options(config: MergeConfig) -> dict[str, Any]:
    """What is merged and how; not how the job runs, which leaves no trace in the result."""
    values = {
        option.name: getattr(config, option.name)
        for option in fields(config)
        if option.metadata["group"] in ("which", "how")
    }
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }
