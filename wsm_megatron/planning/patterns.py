"""What ``--copy`` and ``--drop`` take: a model tensor with its main param and its moments. Pure.

Megatron overwrites the model from the main params in the first step after a load: a model tensor
that is copied while its main param is merged would be undone there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from wsm_megatron.checkpoint.keys import (
    OPTIMIZER_ROLES,
    Role,
    is_flat_bucket,
    is_optimizer,
    main_of,
    model_of,
)
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.optimizer.flat_buckets import flat_buckets
from wsm_megatron.optimizer.flat_main_params import FlatMainParams


@dataclass(frozen=True)
class Choice:
    """Keys of one layout that are copied because a pattern says so, and that are left out."""

    copied: frozenset[str]
    left_out: frozenset[str]


def choose(layout: Layout, config: MergeConfig) -> Choice:
    """What the options take of a checkpoint."""
    copied, left_out = taken(layout, config.copy), taken(layout, config.drop)
    if not config.keeps_optimizer:
        left_out |= {
            key
            for key, entry in layout.entries.items()
            if is_optimizer(key)
            or entry.role in OPTIMIZER_ROLES
            or (entry.role is Role.RNG and key not in copied)
        }
    return Choice(frozenset(copied - left_out), frozenset(left_out))


def taken(layout: Layout, patterns: Sequence[str]) -> set[str]:
    """Entries whose key matches, and the keyed optimizer state of model tensors whose key does."""
    if not patterns:
        return set()
    return {
        key
        for key in layout.entries
        if matches(key, patterns) or matches(model_of(key) or "", patterns)
    }


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a key matches one of several shell patterns."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def check_patterns(layouts: Sequence[Layout], config: MergeConfig) -> None:
    """Raise ``UsageError`` where a pattern of ``--copy`` or ``--drop`` cannot mean what it says."""
    newest = layouts[-1]
    keys = {key for layout in layouts for key in layout.entries}
    for option, patterns in (("--copy", config.copy), ("--drop", config.drop)):
        for pattern in patterns:
            found = [key for key in keys if fnmatchcase(key, pattern)]
            if not found:
                raise UsageError(
                    f"{option} {pattern!r} matches no entry of the sources; wsm inspect "
                    f"{newest.path} --entries lists them"
                )
            if option == "--copy" and not config.keeps_optimizer and all(map(is_optimizer, found)):
                raise UsageError(
                    f"--copy {pattern!r} names optimizer state only, which --optimizer-state drop "
                    "leaves out; use --optimizer-state last to keep it"
                )
        if config.keeps_optimizer:
            _check_mains_alone(newest, option, patterns)


def _check_mains_alone(layout: Layout, option: str, patterns: Sequence[str]) -> None:
    """Main params are taken with their model tensors only."""
    for key, entry in layout.tensors.items():
        if entry.role is not Role.MAIN or not matches(key, patterns):
            continue
        model = main_of(key)
        if model is None:
            raise UsageError(
                f"{layout.path}: {option} takes {key}, the main params of many model tensors; "
                "they are merged with these, or left out with --optimizer-state drop"
            )
        if model in layout.tensors and not matches(model, patterns):
            raise UsageError(
                f"{layout.path}: {option} takes the main param {key} without its model tensor, "
                f"which the first step after a load makes from it; {option} '{model}' takes both, "
                "--optimizer-state drop leaves out all main params"
            )


def check_flat(layout: Layout, choice: Choice, flat: FlatMainParams) -> None:
    """Raise ``UsageError`` where a model tensor is copied or left out, and its main param cannot be
    because it lies in a flat bucket."""
    mains = [key for key, entry in layout.tensors.items() if entry.role is Role.MAIN]
    placed = bool(flat_buckets(layout))  # remainders are written anew, for whatever weights
    if not any(is_flat_bucket(key) and key not in choice.left_out for key in mains):
        return
    keyed = {main_of(key) for key in mains}
    for key, entry in layout.tensors.items():
        if entry.role is not Role.MODEL or key in keyed:
            continue
        if key in choice.left_out:
            raise UsageError(
                f"{layout.path}: --drop leaves out {key}, but its main param lies in a flat bucket "
                "(dp_reshardable), which must be whole; use --optimizer-state drop with it"
            )
        if placed and key in choice.copied and (key in flat.repeated or flat.unknown):
            raise UsageError(
                f"{layout.path}: --copy takes {key}, of which several ranks keep main params in "
                "the flat buckets (dp_reshardable): those of the others would be merged, and undo "
                "the copy; use --optimizer-state drop with it"
            )
        chunks = ((key, Region(chunk.offsets, chunk.sizes)) for chunk in entry.chunks)
        if placed and key in choice.copied and not all(chunk in flat.places for chunk in chunks):
            raise UsageError(
                f"{layout.path}: --copy takes {key}, but where its main param lies in the flat "
                "buckets (dp_reshardable) is not known; use --optimizer-state drop with it"
            )


def pattern_for(keys: Sequence[str], others: Iterable[str]) -> str:
    """A short shell pattern that takes ``keys`` and none of ``others``."""
    parts = [key.split(".") for key in keys]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
        prefix = ".".join(parts[0][:shared])
        if not any(key.startswith(f"{prefix}.") for key in others):
            return f"{prefix}.*"
    return keys[0] if len(keys) == 1 else "PATTERN"
