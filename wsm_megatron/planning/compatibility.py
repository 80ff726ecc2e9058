"""Do the sources fit each other and the options: the checks before a plan is made. Pure."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence

import torch

from wsm_megatron.checkpoint.keys import (
    MERGEABLE,
    Role,
    is_flat_bucket,
    main_of,
)
from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import UsageError, some
from wsm_megatron.optimizer.flat_buckets import flat_buckets
from wsm_megatron.optimizer.fragments import find_fragments
from wsm_megatron.optimizer.indexed_state import unnamed_mains
from wsm_megatron.optimizer.precision import REMAINDERS, Kinds
from wsm_megatron.planning.patterns import Choice, matches, pattern_for, taken
from wsm_megatron.planning.tasks import Recipe, Rule

logger = logging.getLogger(__name__)


def check_unknown(layout: Layout, choice: Choice) -> None:
    """Raise ``UsageError`` where there is no rule for an entry."""
    known = choice.left_out | choice.copied
    unknown = sorted(
        key
        for key, entry in layout.entries.items()
        if entry.role is Role.UNKNOWN and key not in known
    )
    if unknown:
        raise UsageError(
            f"{layout.path}: no rule for {some(unknown)}; let it through with --copy PATTERN "
            "(from the newest source) or leave it out with --drop PATTERN"
        )


def check_same_model(layouts: Sequence[Layout], config: MergeConfig) -> None:
    """Raise ``UsageError`` unless all sources have the same model tensors and buffers."""
    keys = [_model_keys(layout, config) for layout in layouts]
    shared = set.intersection(*keys)
    differing = sorted(set.union(*keys) - shared)
    if not differing:
        return
    for key in differing:
        if all(key in layout.tensors for layout in layouts):
            check_alike(layouts, key)  # of another kind because of its dtype
    holds = [differing[0] in some_keys for some_keys in keys]
    alike = [key for key in differing if [key in some_keys for some_keys in keys] == holds]
    pattern = pattern_for(alike, shared)
    ways = [f"leave it out with --drop '{pattern}'"]
    if holds[-1]:
        ways.append(f"take the newest one's with --copy '{pattern}'")
    raise UsageError(
        f"{layouts[holds.index(False)].path} and {layouts[holds.index(True)].path} are not of one "
        f"model: {some(alike)} is in {_names(layouts, holds, True)} only, not in "
        f"{_names(layouts, holds, False)}; {', or '.join([*ways, *_windows(layouts, holds)])}"
    )


def _model_keys(layout: Layout, config: MergeConfig) -> set[str]:
    return {
        key
        for key, entry in layout.tensors.items()
        if entry.role in (Role.MODEL, Role.BUFFER)
        and not matches(key, config.drop)
        and not matches(key, config.copy)
    }


def check_remainders(layout: Layout, kinds: Kinds, config: MergeConfig) -> None:
    """Raise ``UsageError`` where optimizer state holds remainders that cannot be merged."""
    for key, entry in layout.tensors.items():
        if entry.role is not Role.MAIN or not kinds.of(entry).rebuilt:
            continue
        if config.dtype not in ("same", "bf16"):
            raise UsageError(
                f"{layout.path}: {key} holds {REMAINDERS}: --dtype {config.dtype} would leave them "
                "without these; use --optimizer-state drop with it"
            )
        if is_flat_bucket(key) and not config.rebuild_main_params:
            raise UsageError(
                f"{layout.path}: {key} is {_short(entry.dtype)}: {REMAINDERS}. A flat bucket "
                "(dp_reshardable) has no key for each, no order of params is saved, and any "
                "remainder fits any weights: nothing proves whose each is. --rebuild-main-params "
                "keeps the optimizer state, with the merged bf16 weights as main params; "
                "--optimizer-state drop merges the bf16 weights alone; with "
                "--dist-ckpt-optim-fully-reshardable remainders are saved by key and merge exactly"
            )


def warn_of_remainders(layout: Layout, kinds: Kinds, config: MergeConfig) -> None:
    """Say what becomes of remainders where not all of them go on as they were."""
    found = [e for e in layout.tensors.values() if e.role is Role.MAIN and kinds.of(e).rebuilt]
    in_buckets = [entry.key for entry in found if is_flat_bucket(entry.key)]
    floats = [entry.key for entry in found if entry.dtype.is_floating_point]
    if in_buckets:
        logger.warning(
            "%s: %s holds %s: whose each is cannot be told, so the bf16 weights are merged and "
            "those bits are lost", layout.path, some(in_buckets), REMAINDERS,
        )  # fmt: skip
    if floats and config.keeps_optimizer:
        logger.warning(
            "%s: %s, and others, hold %s, as float32: merged exactly, and written as they are. "
            "Transformer Engine takes none back but int16 (Megatron-LM #4222): where a load stops "
            "at that, launch with --no-load-optim", layout.path, floats[0], REMAINDERS,
        )  # fmt: skip


def check_optimizer(layouts: Sequence[Layout], choice: Choice, config: MergeConfig) -> None:
    """Raise ``UsageError`` where optimizer state that is to be kept cannot be."""
    newest = layouts[-1]
    needed = _keys_of(Role.MAIN, newest, config)
    if not needed and not any(_keys_of(role, newest, config) for role in _STATE_ROLES):
        raise UsageError(
            f"{newest.path}: no optimizer state to keep (saved with --no-save-optim?); use "
            "--optimizer-state drop"
        )
    if not needed and config.dtype != "same":
        raise UsageError(
            f"{newest.path}: --dtype {config.dtype}: there are no main params, as the optimizer "
            "steps on the model itself; it keeps its dtype, or use --optimizer-state drop"
        )
    if config.rebuild_main_params and needed & flat_buckets(newest).keys():
        raise UsageError(
            f"{newest.path}: main params lie in flat buckets (dp_reshardable) without a key for "
            "each; --rebuild-main-params cannot rebuild them; use --optimizer-state drop"
        )
    for layout in layouts:
        _check_named(layout, newest)
    _check_shapes(newest, needed, config)
    _check_dtypes(newest, needed, choice)
    for layout in layouts[:-1]:
        _check_same_optimizer(layout, newest, config)
    _warn_of_copied(newest, choice, config)


def _warn_of_copied(newest: Layout, choice: Choice, config: MergeConfig) -> None:
    """Of state that is no moment there is no merge."""
    if config.optimizer_state != "merge":
        return
    copied = _keys_of(Role.OPTIMIZER, newest, config) - choice.copied
    if copied:
        logger.warning(
            "%s: optimizer state that is no floating moment of its param's shape is copied from "
            "the newest source, not merged: %s", newest.path, some(sorted(copied)),
        )  # fmt: skip


def _check_named(layout: Layout, newest: Layout) -> None:
    """Main params that are numbered are each a model tensor's, the same in all sources."""
    if unnamed := unnamed_mains(layout):
        raise UsageError(
            f"{layout.path}: {some(unnamed)} round to no model tensor: main params of other "
            "weights; use --optimizer-state drop, or leave the checkpoint out"
        )
    for key, entry in layout.tensors.items():
        if entry.role is not Role.MAIN or key not in newest.tensors:
            continue
        if layout.stored_key(key) != newest.stored_key(key):
            raise UsageError(
                f"{layout.path} and {newest.path} number their main params differently: that of "
                f"{main_of(key)} is {layout.stored_key(key)} and {newest.stored_key(key)}; use "
                "--optimizer-state drop"
            )


def _check_shapes(newest: Layout, mains: Iterable[str], config: MergeConfig) -> None:
    """Keyed main params have their model tensor's shape, or are its fragments, each flat."""
    places = find_fragments(newest)
    for key in mains:
        main, model = newest.tensors[key], newest.tensors.get(main_of(key) or "")
        if model is None or model.shape == main.shape:
            continue
        chunks = [(model.key, Region(chunk.offsets, chunk.sizes)) for chunk in model.chunks]
        if config.rebuild_main_params or not all(chunk in places for chunk in chunks):
            raise UsageError(
                f"{newest.path}: {key} is {main.shape}, its model tensor {model.shape}: flattened "
                "optimizer state (fully_sharded_model_space, core up to 0.14) "
                + (
                    "is merged as it is, not rebuilt; leave --rebuild-main-params away"
                    if config.rebuild_main_params
                    else "in other pieces than the model; use --optimizer-state drop"
                )
            )


def _check_dtypes(newest: Layout, mains: Iterable[str], choice: Choice) -> None:
    """A model tensor that no rounding makes from its main param goes with it as it is."""
    for key in mains:
        model = newest.tensors.get(main_of(key) or "")
        if model is None or model.dtype in MERGEABLE:
            continue
        if model.key not in choice.copied | choice.left_out:
            raise UsageError(
                f"{newest.path}: {model.key} is {model.dtype} and cannot be made from its merged "
                f"main param {key}; take both as they are in the newest source with --copy "
                f"'{model.key}', or use --optimizer-state drop"
            )


def _check_same_optimizer(layout: Layout, newest: Layout, config: MergeConfig) -> None:
    """What is merged of the optimizer state is there; keyed main params can do without."""
    mains = _merged_keys(Role.MAIN, newest, config)
    if (
        any(map(is_flat_bucket, mains))
        and not config.rebuild_main_params
        and mains != _merged_keys(Role.MAIN, layout, config)
    ):
        raise UsageError(
            f"{newest.path} keeps its main params in flat buckets (dp_reshardable), {layout.path} "
            "does not keep the same ones: they can neither be merged nor be rebuilt from the "
            "merged model; use --optimizer-state drop, or end the window (--to) at one saved "
            "with --dist-ckpt-optim-fully-reshardable or without the distributed optimizer"
        )
    if config.optimizer_state != "merge":
        return
    moments = _merged_keys(Role.MOMENT, newest, config)
    if differing := sorted(moments ^ _merged_keys(Role.MOMENT, layout, config)):
        raise UsageError(
            f"{layout.path} and {newest.path} keep their moments differently: only one has "
            f"{some(differing)}; use --optimizer-state last (moments of {newest.path}) or drop"
        )


def rebuilds_main_params(layouts: Sequence[Layout], config: MergeConfig) -> bool:
    """Main params come from the merged model: asked for, or not all sources have the newest's.

    Raises:
        UsageError: one has them in a dtype that no merge is made of.
    """
    if not config.keeps_optimizer:
        return False
    if config.rebuild_main_params:
        return True
    mains = [_merged_keys(Role.MAIN, layout, config) for layout in layouts]
    for layout, keys in zip(layouts, mains, strict=True):
        for key in sorted(mains[-1] - keys):
            if (entry := layout.tensors.get(key)) is not None:
                raise UsageError(
                    f"{layout.path}: the main param {key} is {_short(entry.dtype)}, but "
                    f"{_short(layouts[-1].tensors[key].dtype)} in {layouts[-1].path}: damaged, or "
                    "of another optimizer; leave this checkpoint out, or have main params rebuilt "
                    "from the merged model with --rebuild-main-params"
                )
    return any(keys != mains[-1] for keys in mains)


def _keys_of(role: Role, layout: Layout, config: MergeConfig) -> set[str]:
    """Keys of a role that are not left out."""
    keys = {key for key, entry in layout.tensors.items() if entry.role is role}
    return keys - taken(layout, config.drop)


_STATE_ROLES = (Role.MOMENT, Role.OPTIMIZER)
"""Without main params these are there where the model is what the optimizer steps on (fp32)."""


def _merged_keys(role: Role, layout: Layout, config: MergeConfig) -> set[str]:
    """Those that are not copied by a pattern either."""
    return _keys_of(role, layout, config) - taken(layout, config.copy)


def check_inputs(layouts: Sequence[Layout], recipes: Iterable[Recipe]) -> None:
    """Every source has every input that is summed, in the newest one's shape and dtype."""
    for recipe in recipes:
        for key in recipe.inputs if recipe.rule is not Rule.COPY else ():
            check_alike(layouts, key)


def check_alike(layouts: Sequence[Layout], key: str) -> None:
    """Raise ``UsageError`` unless a tensor has one shape and one dtype in all sources."""
    entries = [layout.tensors.get(key) for layout in layouts]
    newest = entries[-1]
    assert newest is not None
    for layout, entry in zip(layouts, entries, strict=True):
        if entry is None:
            raise UsageError(
                f"{layout.path}: no {key}, which {layouts[-1].path} has; leave it out with "
                f"--drop '{key}'"
            )
        if entry.shape != newest.shape:
            shapes = [one.shape for one in entries if one is not None]
            raise UsageError(
                f"{layout.path}: {key} is {entry.shape}, but {newest.shape} in "
                f"{layouts[-1].path}: not one model{_or_windows(layouts, shapes)}. A vocabulary is "
                "padded to a multiple of --make-vocab-size-divisible-by x TP: load the others in "
                "Megatron with the newest one's sizes and save them again"
            )
        if entry.dtype != newest.dtype:
            dtypes = [one.dtype for one in entries if one is not None]
            raise UsageError(
                f"{layout.path}: {key} is {_short(entry.dtype)}, but {_short(newest.dtype)} in "
                f"{layouts[-1].path}; sources must be of one dtype, --dtype is the merge's"
                f"{_or_windows(layouts, dtypes)}. Load the others in Megatron with the newest "
                "one's precision and save them again; for this tensor alone, take the newest one's "
                f"with --copy '{key}'"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _or_windows(layouts: Sequence[Layout], kinds: Sequence[Hashable]) -> str:
    return "".join(f"; {way}" for way in _windows(layouts, kinds))


def _windows(layouts: Sequence[Layout], kinds: Sequence[Hashable]) -> list[str]:
    """Options that choose sources of one kind, where there are two or more of it."""
    ways = []
    for kind in dict.fromkeys(reversed(kinds)):
        places = [j for j, one in enumerate(kinds) if one == kind]
        if len(places) < 2:
            continue
        first, last = (_iteration(layouts[j]) for j in (places[0], places[-1]))
        if places[-1] - places[0] + 1 > len(places):
            chosen = f"--iterations {','.join(_iteration(layouts[j]) for j in places)}"
        elif places[-1] == len(kinds) - 1:
            chosen = f"--from {first}"
        elif places[0] == 0:
            chosen = f"--to {last}"
        else:
            chosen = f"--from {first} --to {last}"
        ways.append(f"merge those that are alike ({chosen})")
    return ways


def _names(layouts: Sequence[Layout], kinds: Sequence[bool], kind: bool) -> str:
    return some([one.path.name for one, its in zip(layouts, kinds, strict=True) if its is kind])


def _iteration(layout: Layout) -> str:
    return layout.path.name.removeprefix("iter_").lstrip("0") or "0"
