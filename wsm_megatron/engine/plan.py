"""Layouts and coefficients become a plan: every tensor's rule, every chunk to write. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase

import torch

from wsm_megatron.checkpoint.box import Box, span_of
from wsm_megatron.checkpoint.layout import Layout, Location, TensorEntry
from wsm_megatron.checkpoint.roles import OPTIMIZER_ROLES, Role, is_flat_bucket, main_of
from wsm_megatron.config import MergeConfig
from wsm_megatron.engine.flat import FlatMain, FlatMains

CHUNK_ELEMENTS = 16 * 2**20
"""Largest chunk written: a larger one of a source becomes several, so that memory, the unit of
balance and what a failure costs stay bounded. Loaders reshard, so chunk sizes are free."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Rule(Enum):
    """How the tensors of a recipe come about."""

    SUM = "merged"
    SUM_MAIN = "main merged, model rounded from it"
    SUM_MODEL = "merged, main rebuilt from it"
    COPY = "copied from the newest source"


@dataclass(frozen=True)
class Output:
    """A tensor of the merged checkpoint."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """One rule applied to one tensor, or to a main param and its model tensor together.

    ``inputs`` are read from every source (from the newest one only for ``COPY``): for ``SUM_MAIN``
    the main param, then the model tensor that it is checked against. ``outputs`` are written in
    this order; with two of them the first is the main param.
    """

    rule: Rule
    role: Role
    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    input_dtypes: tuple[torch.dtype, ...]

    @property
    def key(self) -> str:
        return self.outputs[-1].key

    def cost(self, sources: int, merges: int) -> int:
        """Bytes read and written for one element."""
        reads = sum(d.itemsize for d in self.input_dtypes) * (
            merges if self.rule is Rule.COPY else sources
        )
        return reads + merges * sum(output.dtype.itemsize for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Task:
    """One recipe over one box: the unit of work. Its outputs are one chunk each.

    ``flat``: where the main param lies in a flat bucket, whose boxes are not the model's.
    """

    recipe: Recipe
    box: Box
    flat: FlatMain | None = None

    def part(self, key: str, tile: Box) -> Box:
        """Where the elements of ``tile``, a row-major part of ``box``, lie in a tensor."""
        if self.flat is None or key != self.flat.bucket:
            return tile
        first = span_of(tile.within(self.box), self.box.sizes).start
        return Box((self.flat.start + first,), (tile.numel,))

    def split(self, limit: int) -> Iterator[Task]:
        """The same work as tasks of at most ``limit`` elements."""
        for box in self.box.split(limit):
            flat = self.flat
            if flat is not None:
                flat = FlatMain(flat.bucket, self.part(flat.bucket, box).offsets[0])
            yield Task(self.recipe, box, flat)


@dataclass(frozen=True)
class MergePlan:
    """What a merge does, apart from coefficients: recipes, and tasks in the order of the files."""

    recipes: tuple[Recipe, ...]
    tasks: tuple[Task, ...]
    left_out: tuple[str, ...]
    rebuilds_mains: bool = False
    """Main params are the merged model's, not merged themselves."""

    def bytes_to_read(self, sources: int, merges: int = 1) -> int:
        return sum(
            task.box.numel
            * sum(d.itemsize for d in task.recipe.input_dtypes)
            * (merges if task.recipe.rule is Rule.COPY else sources)
            for task in self.tasks
        )

    def bytes_to_write(self) -> int:
        """Bytes of the tensors of one merged checkpoint."""
        return sum(
            task.box.numel * sum(output.dtype.itemsize for output in task.recipe.outputs)
            for task in self.tasks
        )

    def shares(self, ranks: int, sources: int, merges: int) -> tuple[tuple[Task, ...], ...]:
        """Every rank's tasks: consecutive in the files, equal in bytes within one task."""
        costs = [task.box.numel * task.recipe.cost(sources, merges) for task in self.tasks]
        total, done = max(sum(costs), 1), 0
        shares: list[list[Task]] = [[] for _ in range(ranks)]
        for task, cost in zip(self.tasks, costs, strict=True):
            shares[min(ranks - 1, (done + cost // 2) * ranks // total)].append(task)
            done += cost
        return tuple(map(tuple, shares))


def make_plan(
    layouts: Sequence[Layout], config: MergeConfig, flat: FlatMains | None = None
) -> MergePlan:
    """Plan a merge of checkpoints, oldest first.

    Args:
        flat: the newest one's main params in flat buckets; without, such buckets and the model are
            merged apart from each other.

    Raises:
        ValueError: the checkpoints are not of one model, an entry is unknown, or the optimizer
            state that was asked for is not there. Names the checkpoint and the key.
    """
    newest = layouts[-1]
    left_out = _left_out(newest, config)
    _check_unknown(newest, config, left_out)
    _check_same_model(layouts, config)
    if config.keeps_optimizer:
        _check_optimizer(layouts, config)
    rebuilds = _rebuilds_mains(layouts, config)
    recipes = _recipes(newest, replace(config, mains_from_model=rebuilds), left_out)
    if all(recipe.rule is Rule.COPY for recipe in recipes):
        raise ValueError(f"{newest.path}: nothing is left to merge; see --drop and --copy")
    _check_inputs(layouts, recipes)
    placed = [
        ((location.file, location.offset, task.box.offsets), task)
        for recipe in recipes
        for location, task in _tasks(recipe, newest, flat or FlatMains())
    ]
    placed.sort(key=lambda pair: pair[0])
    tasks = [task for _, task in placed]
    used = dict.fromkeys(task.recipe for task in tasks)
    return MergePlan(tuple(used), tuple(tasks), tuple(sorted(left_out)), rebuilds)


def kept_objects(layout: Layout, config: MergeConfig) -> tuple[str, ...]:
    """Byte entries that a merged checkpoint takes over from its newest source, as they are."""
    left_out = _left_out(layout, config)
    _check_unknown(layout, config, left_out)
    return tuple(
        key
        for key, entry in layout.objects.items()
        if key not in left_out and entry.role is not Role.COMMON
    )


def _left_out(layout: Layout, config: MergeConfig) -> set[str]:
    dropped = OPTIMIZER_ROLES | {Role.RNG} if not config.keeps_optimizer else frozenset()
    return {
        key
        for key, entry in layout.entries.items()
        if _matches(key, config.drop)
        or (entry.role in dropped and not _matches(key, config.copy))
        or (not config.keeps_optimizer and _is_optimizer(key) and not _matches(key, config.copy))
    }


def _is_optimizer(key: str) -> bool:
    """An entry of an optimizer that the roles do not know still counts as optimizer state."""
    return key.startswith("optimizer.") or (key.startswith("chained_") and ".optimizer." in key)


def _check_unknown(layout: Layout, config: MergeConfig, left_out: set[str]) -> None:
    unknown = sorted(
        key
        for key, entry in layout.entries.items()
        if entry.role is Role.UNKNOWN and key not in left_out and not _matches(key, config.copy)
    )
    if unknown:
        raise ValueError(
            f"{layout.path}: no rule for {_some(unknown)}; let it through with --copy PATTERN "
            "(from the newest source) or leave it out with --drop PATTERN"
        )


def _check_same_model(layouts: Sequence[Layout], config: MergeConfig) -> None:
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
        and not _matches(key, config.drop)
        and not _matches(key, config.copy)
    }


def _check_optimizer(layouts: Sequence[Layout], config: MergeConfig) -> None:
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


def _rebuilds_mains(layouts: Sequence[Layout], config: MergeConfig) -> bool:
    """Main params come from the merged model: asked for, or not all sources have the newest's."""
    if not config.keeps_optimizer:
        return False
    mains = [_keys_of(Role.MAIN, layout, config) for layout in layouts]
    return config.mains_from_model or any(keys != mains[-1] for keys in mains)


def _keys_of(role: Role, layout: Layout, config: MergeConfig) -> set[str]:
    return {
        key
        for key, entry in layout.tensors.items()
        if entry.role is role and not _matches(key, config.drop)
    }


def _recipes(newest: Layout, config: MergeConfig, left_out: set[str]) -> list[Recipe]:
    kept = {key: entry for key, entry in newest.tensors.items() if key not in left_out}
    mains = {
        model: key
        for key, entry in kept.items()
        if entry.role is Role.MAIN and (model := main_of(key)) in kept
    }
    recipes = []
    for key, entry in kept.items():
        if entry.role is Role.MAIN and main_of(key) in kept:
            continue  # comes with its model tensor
        main = kept.get(mains.get(key, ""))
        if main is not None and not _is_copied(entry, config):
            recipes.append(_pair(main, entry, config))
        else:
            recipes.append(_single(entry, config))
            if main is not None:
                recipes.append(_single(main, config))
    return recipes


def _pair(main: TensorEntry, model: TensorEntry, config: MergeConfig) -> Recipe:
    outputs = _output(main, main.dtype), _output(model, _model_dtype(model, config))
    if config.mains_from_model:
        return Recipe(Rule.SUM_MODEL, Role.MODEL, (model.key,), outputs, (model.dtype,))
    inputs, dtypes = (main.key, model.key), (main.dtype, model.dtype)
    return Recipe(Rule.SUM_MAIN, Role.MODEL, inputs, outputs, dtypes)


def _single(entry: TensorEntry, config: MergeConfig) -> Recipe:
    rule = Rule.COPY if _is_copied(entry, config) else Rule.SUM
    dtype = _model_dtype(entry, config) if rule is Rule.SUM else entry.dtype
    return Recipe(rule, entry.role, (entry.key,), (_output(entry, dtype),), (entry.dtype,))


def _is_copied(entry: TensorEntry, config: MergeConfig) -> bool:
    return (
        entry.role in (Role.COPY, Role.UNKNOWN)
        or (entry.role is Role.BUFFER and config.buffers == "last")
        or (entry.role is Role.MOMENT and config.optimizer_state == "last")
        or _matches(entry.key, config.copy)
    )


def _model_dtype(entry: TensorEntry, config: MergeConfig) -> torch.dtype:
    return _DTYPES.get(config.dtype, entry.dtype) if entry.role is Role.MODEL else entry.dtype


def _output(entry: TensorEntry, dtype: torch.dtype) -> Output:
    return Output(entry.key, dtype, entry.shape)


def _check_inputs(layouts: Sequence[Layout], recipes: Iterable[Recipe]) -> None:
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


def _tasks(recipe: Recipe, newest: Layout, flat: FlatMains) -> Iterable[tuple[Location, Task]]:
    """Tasks of one recipe, by chunk of the newest source, and where each chunk lies."""
    entry = newest.tensors[recipe.inputs[-1]]
    merged = recipe.rule is Rule.SUM
    for chunk in entry.chunks:
        whole = Box(chunk.offsets, chunk.sizes)
        main = flat.places.get((entry.key, whole)) if merged else None
        if main is not None:
            both = _flat_pair(recipe, newest.tensors[main.bucket])
            for task in Task(both, whole, main).split(CHUNK_ELEMENTS):
                yield chunk.location, task
            continue
        for part in flat.rest(entry.key, whole) if is_flat_main(entry) else (whole,):
            for box in part.split(CHUNK_ELEMENTS):
                yield chunk.location, Task(recipe, box)


def is_flat_main(entry: TensorEntry) -> bool:
    return entry.role is Role.MAIN and is_flat_bucket(entry.key)


def _flat_pair(recipe: Recipe, bucket: TensorEntry) -> Recipe:
    """A model tensor rounded from its merged main param, which lies in a flat bucket."""
    return Recipe(
        Rule.SUM_MAIN,
        recipe.role,
        (bucket.key, *recipe.inputs),
        (_output(bucket, bucket.dtype), *recipe.outputs),
        (bucket.dtype, *recipe.input_dtypes),
    )


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _some(keys: Sequence[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
