"""Main params that are not the rounded model: by design, by a defect, or as they are others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.checkpoint.common_state import attributes, load_common, read_common
from wsm_megatron.checkpoint.keys import is_flat_bucket
from wsm_megatron.checkpoint.layout import COMMON_FILE, METADATA_FILE, read_layout
from wsm_megatron.errors import some

_QUANTISED = {
    "fp8_param_gather": "--fp8-param-gather",
    "fp4_param_gather": "--fp4-param-gather",
    "fp4_param": "--fp4-param-gather",  # its name in args through core 0.16
}
_REMAINDER = 2**15
_NO_WEIGHT = 2**8
"""Larger than any weight that is trained; nearly every remainder is."""

REMAINDERS = (
    "the low 16 bits of main params whose high ones are the bf16 weights "
    "(--use-precision-aware-optimizer)"
)


def quantised_by(args: Mapping[str, Any]) -> str | None:
    """The option by which a run keeps its model weights in FP8 or FP4; None where it does not.

    Megatron dequantises them for the checkpoint (``filesystem_async.py``); the main params stay
    float32. They were never rounded to what is saved.
    """
    return next((option for name, option in _QUANTISED.items() if args.get(name)), None)


def are_remainders(main: torch.Tensor) -> bool:
    """Whether a float32 main param holds 16-bit remainders (``store_param_remainders``).

    With ``fully_reshardable`` they go through float32 buffers: integers within ±32768.
    """
    return bool((main == main.round()).all() and _NO_WEIGHT < main.abs().max().item() <= _REMAINDER)


def saved_args(path: Path) -> dict[str, Any]:
    """The args in a checkpoint's common state; none where they are not on this machine.

    Raises:
        MergeError: the common state is damaged.
    """
    layout = None
    if not (path / COMMON_FILE).is_file():
        if not (path / METADATA_FILE).is_file():
            return {}
        layout = read_layout(path, whole=False)
        entry = layout.common_entry
        if entry is None or not (path / entry.location.file).is_file():
            return {}
    return attributes(load_common(*read_common(path, layout)).get("args"))


def explain(path: Path, main: str, values: torch.Tensor | None = None) -> str:
    """Why a checkpoint's main param may differ from its rounded model tensor, and the way out.

    Args:
        main: its key, or its flat bucket's. values: of it, where they were read.
    """
    if values is not None and are_remainders(values):
        return (
            f"What lies there are {REMAINDERS}, saved as float32; they are not merged yet. "
            "--optimizer-state drop merges the bf16 weights and loses those bits"
        )
    if option := quantised_by(saved_args(path)):
        return (
            f"It was saved with {option}: its model tensors are quantised weights, and its main "
            "params are more precise by design; they are not merged yet. --optimizer-state drop "
            "merges the quantised weights and loses the main params' precision"
        )
    if is_flat_bucket(main):
        return (
            "One step after a load Megatron would replace the model's weights by those. Is one of "
            "its files of another save? Restore it, leave this checkpoint out, or merge the "
            "weights alone with --optimizer-state drop"
        )
    return (
        "Megatron-LM through core_r0.19 can save such mains with fully_reshardable optimizer state "
        "and several DDP buckets; the model tensors are right then. Merge with "
        "--rebuild-main-params, or --optimizer-state drop"
    )


def no_main(path: Path, models: Sequence[str], bucket: str) -> str:
    """Message for model tensors that no main param in a checkpoint's flat buckets rounds to."""
    return (
        f"{path}: the main params of {some(models)} are not in its flat buckets (dp_reshardable): "
        f"nothing there rounds to them, and there are main params of other weights. "
        f"{explain(path, bucket)}"
    )
