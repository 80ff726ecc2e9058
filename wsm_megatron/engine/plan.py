"""Layouts and coefficients become a plan: every tensor's rule, every chunk to write. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.layout import Layout, Location, TensorEntry
from wsm_megatron.checkpoint.roles import OPTIMIZER_ROLES, Role, is_flat_bucket, main_of
from wsm_megatron.config import MergeConfig
from wsm_megatron.engine.compatible import (
    check_inputs,
    check_optimizer,
    check_remainders,
    check_same_model,
    check_unknown,
    matches,
    rebuilds_mains,
)
from wsm_megatron.engine.flat import FlatMains
from wsm_megatron.engine.recipe import Merge, Output, Recipe, Rule, Task, costs

CHUNK_ELEMENTS = 16 * 2**20
"""Largest chunk written: a larger one of a source becomes several, so that memory, the unit of
balance and what a failure costs stay bounded. Loaders reshard, so chunk sizes are free."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class MergePlan:
    """What a merge does, apart from coefficients: recipes, and tasks in the order of the files."""

    recipes: tuple[Recipe, ...]
    tasks: tuple[Task, ...]
    left_out: tuple[str, ...]
    rebuilds_mains: bool = False
    """Main params are the merged model's, not merged themselves."""

    def bytes_to_write(self) -> int:
        """Bytes of the tensors of one merged checkpoint."""
        return sum(task.box.numel * task.recipe.cost(0, 1) for task in self.tasks)

    def shares(self, ranks: int, merges: Sequence[Merge]) -> tuple[tuple[Task, ...], ...]:
        """Every rank's tasks: consecutive in the files, equal in bytes within one task."""
        of_tasks = costs(self.tasks, merges)
        total, done = max(sum(of_tasks), 1), 0
        shares: list[list[Task]] = [[] for _ in range(ranks)]
        for task, cost in zip(self.tasks, of_tasks, strict=True):
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
    if config.keeps_optimizer:
        check_remainders(newest)
    check_unknown(newest, config, left_out)
    check_same_model(layouts, config)
    if config.keeps_optimizer:
        check_optimizer(layouts, config)
    rebuilds = rebuilds_mains(layouts, config)
    recipes = _recipes(newest, replace(config, mains_from_model=rebuilds), left_out)
    if all(recipe.rule is Rule.COPY for recipe in recipes):
        raise ValueError(f"{newest.path}: nothing is left to merge; see --drop and --copy")
    check_inputs(layouts, recipes)
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
    check_unknown(layout, config, left_out)
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
        if matches(key, config.drop)
        or (entry.role in dropped and not matches(key, config.copy))
        or (not config.keeps_optimizer and _is_optimizer(key) and not matches(key, config.copy))
    }


def _is_optimizer(key: str) -> bool:
    """An entry of an optimizer that the roles do not know still counts as optimizer state."""
    return key.startswith("optimizer.") or (key.startswith("chained_") and ".optimizer." in key)


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
        or matches(entry.key, config.copy)
    )


def _model_dtype(entry: TensorEntry, config: MergeConfig) -> torch.dtype:
    return _DTYPES.get(config.dtype, entry.dtype) if entry.role is Role.MODEL else entry.dtype


def _output(entry: TensorEntry, dtype: torch.dtype) -> Output:
    return Output(entry.key, dtype, entry.shape)


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
