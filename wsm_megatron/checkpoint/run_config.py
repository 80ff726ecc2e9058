"""Megatron-Bridge's ``run_config.yaml``: what takes the place of Megatron-LM's ``args`` there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from wsm_megatron.checkpoint.bridge import (
    MOST_BYTES,
    RUN_CONFIG_FILE,
    TRAIN_STATE_FILE,
    consumed_samples,
)
from wsm_megatron.checkpoint.reader import read_file

_SECTIONS = ("optimizer", "ddp", "model")
"""Where Bridge keeps what ``args`` say of precision; the first one that says it counts."""


def read_run_config(checkpoint: Path) -> Mapping[str, Any]:
    """The sections of a checkpoint's run config; none where it has no such file, or one that is no
    YAML and so not Bridge's."""
    path = checkpoint / RUN_CONFIG_FILE
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return {}
    try:
        config = yaml.safe_load(read_file(path))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        return {}  # a tag with a value that is none of its kind raises the last four
    sections = config if isinstance(config, dict) else {}
    return {name: section for name, section in sections.items() if isinstance(section, dict)}


def read_progress(checkpoint: Path) -> tuple[int | None, int | None]:
    """Training samples consumed, and tokens a sample, of a checkpoint of Bridge's; None for what
    its files do not say.

    Raises:
        MergeError: the train state is damaged.
    """
    length = read_run_config(checkpoint).get("model", {}).get("seq_length")
    path = checkpoint / TRAIN_STATE_FILE
    if length is None or not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None, None
    return consumed_samples(read_file(path), str(path)), length if type(length) is int else None


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
