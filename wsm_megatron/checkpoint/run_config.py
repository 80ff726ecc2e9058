"""Megatron-Bridge's ``run_config.yaml``: what takes the place of Megatron-LM's ``args`` there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from wsm_megatron.checkpoint.bridge import MOST_BYTES, RUN_CONFIG_FILE
from wsm_megatron.checkpoint.reader import read_file
from wsm_megatron.errors import MergeError

_SECTIONS = ("optimizer", "ddp", "model")
"""Where Bridge keeps what ``args`` say of precision; the first one that says it counts."""


def read_run_config(checkpoint: Path) -> Mapping[str, Any]:
    """The sections of a checkpoint's run config; none where it has no such file, or another's.

    Raises:
        MergeError: the file is damaged.
    """
    path = checkpoint / RUN_CONFIG_FILE
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return {}
    try:
        config = yaml.safe_load(read_file(path))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise MergeError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    sections = config if isinstance(config, dict) else {}
    return {name: section for name, section in sections.items() if isinstance(section, dict)}


def args_in(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Of these args of Megatron-LM those that a run config says, dtypes as torch's."""
    said = {
        name: [config[s][name] for s in _SECTIONS if config.get(s, {}).get(name) is not None]
        for name in names
    }
    return {name: _value(values[0]) for name, values in said.items() if values}


def _value(value: Any) -> Any:
    """``{_target_: torch.float16, _call_: false}`` is how Bridge writes a dtype."""
    target = str(value.get("_target_")) if isinstance(value, dict) else ""
    dtype = getattr(torch, target.removeprefix("torch."), None)
    return dtype if target.startswith("torch.") and isinstance(dtype, torch.dtype) else value
