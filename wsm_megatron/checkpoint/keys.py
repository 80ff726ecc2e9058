"""What an entry of a Megatron checkpoint is for, told by its key and dtype."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
_KEYED = re.compile(rf"({_CHAIN}optimizer\.state\.)([^.]+)\.(.+)")
_OPTIMIZER = re.compile(rf"{_CHAIN}optimizer\b")
_FLAT = re.compile(rf"({_CHAIN}optimizer\.distributed\..+\.bucket_idx_\d+\.)([^.]+)")
_OPTIMIZER_OBJECT = re.compile(
    rf"{_CHAIN}optimizer\.distributed\.dp_group_idx_\d+\."
    r"(optimizer|grad_scaler|per_bucket_numel|per_bucket_numel_unpadded)/shard_.+"
)
MAINS = ("fp32_param", "param")
"""Names of main params among optimizer state."""
_BUFFER = re.compile(r"(?:.*\.)?(expert_bias|running_mean|running_var|inv_freq)")
_COPIED_OBJECT = re.compile(r"(rerun_state_machine_state|tokenizer)(/.*)?")


def tensor_role(key: str, dtype: torch.dtype) -> Role:
    """Role of a tensor entry (keys as in Megatron's ``sharded_state_dict``).

    Floating optimizer state counts as a moment here; :func:`state_roles` tells what is none.
    """
    state = state_of(key)
    if state is not None:
        if state[2] in MAINS:
            kept = dtype in MERGEABLE or stores_remainders(key, dtype)
            return Role.MAIN if kept else Role.UNKNOWN
        return Role.MOMENT if dtype in MERGEABLE else Role.OPTIMIZER
    if is_optimizer(key) or dtype.is_complex:
        return Role.UNKNOWN
    if dtype in MERGEABLE:
        return Role.BUFFER if _BUFFER.fullmatch(key) else Role.MODEL
    return Role.UNKNOWN if dtype.is_floating_point else Role.COPY


def state_roles(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Role]:
    """Roles of the floating optimizer state that is no moment, by what all of it looks like.

    A moment has an element for every element of its param. Preconditioners (SOAP), scales and code
    books (8-bit Adam) have another shape for some param at least, so the whole of that name is
    none; what stands beside codes, integers in the param's shape, goes with these. State of no
    param in the checkpoint is unknown.

    Args:
        tensors: dtype and shape of every tensor of a checkpoint.
    """
    roles: dict[str, Role] = {}
    others: set[tuple[str, str]] = set()
    coded: set[tuple[str, str]] = set()
    states = {key: found for key in tensors if (found := state_of(key)) and found[2] not in MAINS}
    for key, (group, param, name) in states.items():
        dtype, shape = tensors[key]
        of_param = _param_shape(tensors, group, param)
        if of_param is None:
            roles[key] = Role.UNKNOWN
        elif shape != of_param:
            others.add((group, name))
        elif not dtype.is_floating_point:
            coded.add((group, param))
    for key, (group, param, name) in states.items():
        if (group, name) in others or (group, param) in coded:
            roles.setdefault(key, Role.OPTIMIZER)
    return roles


def state_of(key: str) -> tuple[str, str, str] | None:
    """What optimizer state is of: its group, its param (empty in a flat bucket), its name.

    The group is what comes before the name: an optimizer of a chain, or a flat bucket. None for
    keys of no optimizer state.
    """
    if keyed := _KEYED.fullmatch(key):
        return keyed[1], keyed[3], keyed[2]
    flat = _FLAT.fullmatch(key)
    return (flat[1], "", flat[2]) if flat else None


def state_key(group: str, name: str, param: str) -> str:
    """Key of optimizer state, the other way round from :func:`state_of`."""
    return f"{group}{name}.{param}".removesuffix(".")


def _param_shape(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], group: str, param: str
) -> tuple[int, ...] | None:
    """Of the main param, or where there is none of the model tensor; None where neither is."""
    mains = [state_key(group, name, param) for name in MAINS]
    found = next((tensors[key] for key in (*mains, param) if key in tensors), None)
    return None if found is None else found[1]


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
    return match[3] if match and match[2] in MAINS else None


def model_of(key: str) -> str | None:
    """Key of the model tensor that keyed optimizer state is of: a main param, a moment, another."""
    match = _KEYED.fullmatch(key)
    return match[3] if match else None


def is_optimizer(key: str) -> bool:
    """Whether an entry is an optimizer's, of whatever kind."""
    return _OPTIMIZER.match(key) is not None


def main_params_beside(key: str) -> str:
    """The main params of the flat bucket that ``key`` is a part of: they lie as its moments do."""
    return f"{key.rpartition('.')[0]}.param"


def stores_remainders(key: str, dtype: torch.dtype) -> bool:
    """Whether the entry holds the low 16 bits of main params in place of those.

    The precision-aware optimizer does (``store_param_remainders``): the high bits are the bf16
    model weights, rounded half up. ``dp_reshardable`` saves them as int16.
    """
    state = state_of(key)
    return dtype is torch.int16 and state is not None and state[2] == "param"


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
