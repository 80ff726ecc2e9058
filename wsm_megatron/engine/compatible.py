"""Do the sources fit each other and the options: the checks before a plan is made. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from wsm_megatron.checkpoint.layout import Layout
from wsm_megatron.checkpoint.roles import Role, is_flat_bucket, main_of, stores_remainders
from wsm_megatron.config import MergeConfig
from wsm_megatron.engine.precision import REMAINDERS
from wsm_megatron.engine.recipe import Recipe, Rule


def check_unknown(layout: Layout, config: MergeConfig, left_out: set[str]) -> None:
    """Raise ``ValueError`` where there is no rule for an entry."""
    unknown = sorted(
        key
        for key, entry in layout.entries.items()
        if entry.role is Role.UNKNOWN and key not in left_out and not matches(key, config.copy)
    )
    if unknown:
        raise ValueError(
            f"{layout.path}: no rule for {_some(unknown)}; let it through with --copy PATTERN "
            "(from the newest source) or leave it out with --drop PATTERN"
        )


def check_same_model(layouts: Sequence[Layout], config: MergeConfig) -> None:
    """Raise ``ValueError`` unless all sources have the same model tensors and buffers."""
    newest = layouts[-1]
    expected = _model_keys(newest, config)
    for layout in layouts[:-1]:
        if differing := sorted(expected ^ _model_keys(layout, config)):
            raise ValueError(
                f"{layout.path} and {newest.path} are not of one model: only one has "
                f"{_some(differing)}"
            )


def _model_keys(layout: Layout, config: MergeConfig) -> set[str]:
    return {
        key
        for key, entry in layout.tensors.items()
        if entry.role in (Role.MODEL, Role.BUFFER)
        and not matches(key, config.drop)
        and not matches(key, config.copy)
    }


def check_remainders(layout: Layout) -> None:
    """Raise ``ValueError`` where optimizer state holds remainders instead of main params."""
    for key, entry in layout.tensors.items():
        if stores_remainders(key, entry.dtype):
            raise ValueError(
                f"{layout.path}: {key} is int16: {REMAINDERS}; they are not merged yet. Use "
                "--optimizer-state drop, which merges the bf16 weights and loses those bits"
            )


def check_optimizer(layouts: Sequence[Layout], config: MergeConfig) -> None:
    """Raise ``ValueError`` where optimizer state that is to be kept cannot be."""
    newest = layouts[-1]
    needed = _keys_of(Role.MAIN, newest, config)
    if not needed:
        raise ValueError(
            f"{newest.path}: no optimizer state to keep (saved with --no-save-optim?); use "
            "--optimizer-state drop"
        )
    if config.mains_from_model and any(map(is_flat_bucket, needed)):
        raise ValueError(
            f"{newest.path}: main params lie in flat buckets (dp_reshardable) without a key for "
            "each; --mains-from-model cannot rebuild them; use --optimizer-state drop"
        )
    _check_shapes(newest, needed)
    for layout in layouts[:-1]:
        _check_same_optimizer(layout, newest, config)


def _check_shapes(newest: Layout, mains: Iterable[str]) -> None:
    """Keyed main params have their model tensor's shape; older layouts flatten them."""
    for key in mains:
        model = newest.tensors.get(main_of(key) or "")
        if model is not None and model.shape != newest.tensors[key].shape:
            raise ValueError(
                f"{newest.path}: {key} is {newest.tensors[key].shape}, its model tensor "
                f"{model.shape}: flattened optimizer state (fully_sharded_model_space, core up to "
                "0.14); use --optimizer-state drop"
            )


def _check_same_optimizer(layout: Layout, newest: Layout, config: MergeConfig) -> None:
    """What is merged of the optimizer state is there; keyed main params can do without."""
    mains = _keys_of(Role.MAIN, newest, config)
    if any(map(is_flat_bucket, mains)) and mains != _keys_of(Role.MAIN, layout, config):
        raise ValueError(
            f"{newest.path} keeps its main params in flat buckets (dp_reshardable), {layout.path} "
            "does not keep the same ones: they can neither be merged nor be rebuilt from the "
            "merged model; use --optimizer-state drop, or end the window (--to) at one saved "
            "with --dist-ckpt-optim-fully-reshardable or without the distributed optimizer"
        )
    if config.optimizer_state != "merge":
        return
    moments = _keys_of(Role.MOMENT, newest, config)
    if differing := sorted(moments ^ _keys_of(Role.MOMENT, layout, config)):
        raise ValueError(
            f"{layout.path} and {newest.path} keep their moments differently: only one has "
            f"{_some(differing)}; use --optimizer-state last (moments of {newest.path}) or drop"
        )


def rebuilds_mains(layouts: Sequence[Layout], config: MergeConfig) -> bool:
    """Main params come from the merged model: asked for, or not all sources have the newest's."""
    if not config.keeps_optimizer:
        return False
    mains = [_keys_of(Role.MAIN, layout, config) for layout in layouts]
    return config.mains_from_model or any(keys != mains[-1] for keys in mains)


def _keys_of(role: Role, layout: Layout, config: MergeConfig) -> set[str]:
    return {
        key
        for key, entry in layout.tensors.items()
        if entry.role is role and not matches(key, config.drop)
    }


def check_inputs(layouts: Sequence[Layout], recipes: Iterable[Recipe]) -> None:
    """Every source has every input, in the newest one's shape and dtype."""
    newest = layouts[-1]
    for recipe in recipes:
        if recipe.rule is Rule.COPY:
            continue
        for key in recipe.inputs:
            for layout in layouts[:-1]:
                check_entry(layout, newest, key)


def check_entry(layout: Layout, newest: Layout, key: str) -> None:
    """Raise ``ValueError`` unless a tensor has the newest source's shape and dtype."""
    if key not in layout.tensors:
        raise ValueError(f"{layout.path}: no {key}, which {newest.path} has")
    entry, expected = layout.tensors[key], newest.tensors[key]
    if entry.shape != expected.shape:
        raise ValueError(
            f"{key} is {entry.shape} in {layout.path} but {expected.shape} in {newest.path}: not "
            "one model (a vocabulary is padded to a multiple that depends on TP: "
            "--make-vocab-size-divisible-by)"
        )
    if entry.dtype != expected.dtype:
        raise ValueError(
            f"{key} is {entry.dtype} in {layout.path} but {expected.dtype} in {newest.path}"
        )


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a key matches one of several shell patterns."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _some(keys: Sequence[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
