"""What an entry of a Megatron checkpoint is for, told by its key and dtype."""

from __future__ import annotations

import re
from enum import Enum

import torch

MERGEABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Role(Enum):
    """The part an entry plays in training; the merge has one rule for each."""

    MODEL = "model"
    BUFFER = "buffer"
    MAIN = "main param"
    MOMENT = "moment"
    OPTIMIZER = "optimizer state"
    EXTRA = "extra state"
    RNG = "rng"
    COMMON = "common state"
    COPY = "copied"
    UNKNOWN = "unknown"


OPTIMIZER_ROLES = frozenset({Role.MAIN, Role.MOMENT, Role.OPTIMIZER})

PARAM_ALIGNMENT = 64
"""Megatron starts every param of a bucket at a multiple of this (``_ParamAndGradBuffer``)."""
_CHAIN = r"(?:chained_\d+\.)?"
_KEYED = re.compile(rf"{_CHAIN}optimizer\.state\.(fp32_param|param|exp_avg|exp_avg_sq)\.(.+)")
_STATE = re.compile(rf"{_CHAIN}optimizer\.state\.[^.]+\.(.+)")
_OPTIMIZER = re.compile(rf"{_CHAIN}optimizer\b")
_FLAT = re.compile(rf"{_CHAIN}optimizer\.distributed\..+\.(param|exp_avg|exp_avg_sq)")
_OPTIMIZER_OBJECT = re.compile(
    rf"{_CHAIN}optimizer\.distributed\.dp_group_idx_\d+\."
    r"(optimizer|per_bucket_numel|per_bucket_numel_unpadded)/shard_.+"
)
_MAINS = ("fp32_param", "param")
_BUFFER = re.compile(r"(?:.*\.)?(expert_bias|running_mean|running_var|inv_freq)")
_COPIED_OBJECT = re.compile(r"(rerun_state_machine_state|tokenizer)(/.*)?")


def tensor_role(key: str, dtype: torch.dtype) -> Role:
    """Role of a tensor entry (keys as in Megatron's ``sharded_state_dict``)."""
    optimizer = _KEYED.fullmatch(key) or _FLAT.fullmatch(key)
    if optimizer and dtype in MERGEABLE:
        return Role.MAIN if optimizer[1] in _MAINS else Role.MOMENT
    if is_optimizer(key) or dtype.is_complex:
        return Role.UNKNOWN
    if dtype in MERGEABLE:
        return Role.BUFFER if _BUFFER.fullmatch(key) else Role.MODEL
    return Role.UNKNOWN if dtype.is_floating_point else Role.COPY


def object_role(key: str) -> Role:
    """Role of an entry stored as bytes (Megatron's ``ShardedObject``)."""
    if key.startswith("common_state/"):
        return Role.COMMON
    if key.startswith("rng_state/"):
        return Role.RNG
    if _OPTIMIZER_OBJECT.fullmatch(key):
        return Role.OPTIMIZER
    if "._extra_state" in key or key.startswith("_extra_state"):
        return Role.EXTRA
    return Role.COPY if _COPIED_OBJECT.fullmatch(key) else Role.UNKNOWN


def main_of(key: str) -> str | None:
    """Key of a main param's model tensor; None for other keys and for flat buckets."""
    match = _KEYED.fullmatch(key)
    return match[2] if match and match[1] in _MAINS else None


def model_of(key: str) -> str | None:
    """Key of the model tensor that keyed optimizer state is of: a main param, a moment, another."""
    match = _STATE.fullmatch(key)
    return match[1] if match else None


def is_optimizer(key: str) -> bool:
    """Whether an entry is an optimizer's, of whatever kind."""
    return _OPTIMIZER.match(key) is not None


def mains_beside(key: str) -> str:
    """The main params of the flat bucket that ``key`` is a part of: they lie as its moments do."""
    return f"{key.rpartition('.')[0]}.param"


def stores_remainders(key: str, dtype: torch.dtype) -> bool:
    """Whether the entry holds the low 16 bits of main params in place of those.

    The precision-aware optimizer does (``store_param_remainders``): the high bits are the bf16
    model weights, rounded half up. ``dp_reshardable`` saves them as int16.
    """
    match = _KEYED.fullmatch(key) or _FLAT.fullmatch(key)
    return dtype is torch.int16 and match is not None and match[1] in _MAINS


def is_variance(key: str) -> bool:
    """Whether the entry is a running variance, which is never negative."""
    return key.rpartition(".")[2] == "running_var"


def is_flat_bucket(key: str) -> bool:
    """Whether the entry is a ``dp_reshardable`` bucket: several params and padding in one."""
    return _FLAT.fullmatch(key) is not None


def may_be_padding(key: str, offset: int, numel: int) -> bool:
    """Whether a chunk of a flat bucket may be the padding between two params.

    Megatron starts every param at a multiple of 64 elements (``_ParamAndGradBuffer``) and saves the
    gap before it as a chunk of uninitialised memory. Nothing marks such a chunk: it is one that
    starts off that grid and ends before or at the next multiple.
    """
    if not is_flat_bucket(key) or offset % PARAM_ALIGNMENT == 0:
        return False
    return offset % PARAM_ALIGNMENT + numel <= PARAM_ALIGNMENT
