"""Layouts and coefficients become a plan: every tensor's rule, every chunk to write. Pure."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from wsm_megatron.checkpoint.container import STORED
from wsm_megatron.checkpoint.keys import (
    MERGEABLE,
    Role,
    is_flat_bucket,
    main_of,
    main_params_beside,
)
from wsm_megatron.checkpoint.layout import Layout, Location, TensorEntry
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.tiling import tiling_fault
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import MergeError, UsageError, some
from wsm_megatron.optimizer.flat_main_params import FlatMainParam, FlatMainParams
from wsm_megatron.optimizer.fragments import find_fragments, is_fragmented
from wsm_megatron.optimizer.precision import Kinds
from wsm_megatron.optimizer.representation import Representation
from wsm_megatron.planning.compatibility import (
    check_inputs,
    check_optimizer,
    check_remainders,
    check_same_model,
    check_unknown,
    rebuilds_main_params,
    warn_of_remainders,
)
from wsm_megatron.planning.patterns import Choice, check_flat, check_patterns, choose, matches
from wsm_megatron.planning.tasks import Merge, Output, Recipe, Rule, Task, costs

logger = logging.getLogger(__name__)

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
    rebuilds_main_params: bool = False
    """Main params are the merged model's, not merged themselves."""

    def of_weights(self, keys: Collection[str]) -> MergePlan:
        """As far as it makes some model tensors. Main params are summed where they would be, and
        not written."""
        recipes = {
            one: replace(one, outputs=one.outputs[-1:]) for one in self.recipes if one.key in keys
        }
        tasks = tuple(
            Task(recipes[task.recipe], task.region, task.flat)
            for task in self.tasks
            if task.recipe in recipes
        )
        return replace(self, recipes=tuple(recipes.values()), tasks=tasks)

    def bytes_to_write(self) -> int:
        """Bytes of the tensors of one merged checkpoint."""
        return sum(task.region.numel * task.recipe.cost(0, 1) for task in self.tasks)

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
    layouts: Sequence[Layout],
    config: MergeConfig,
    flat: FlatMainParams | None = None,
    kinds: Kinds | None = None,
) -> MergePlan:
    """Plan a merge of checkpoints, oldest first.

    Args:
        flat: the newest one's main params in flat buckets; without, such buckets and the model are
            merged apart from each other.
        kinds: how the newest one keeps its main params; without, each rounds to its model tensor.

    Raises:
        UsageError: the checkpoints are not of one model, an entry is unknown, an option does not
            fit them, or the optimizer state that was asked for is not there. Names the checkpoint
            and the key.
        MergeError: what would be written is not every tensor, whole.
    """
    newest, flat, kinds = layouts[-1], flat or FlatMainParams(), kinds or Kinds()
    if config.keeps_optimizer:
        check_remainders(newest, kinds, config)
    check_patterns(layouts, config)
    choice = choose(newest, config)
    check_unknown(newest, choice)
    check_same_model(layouts, config)
    if config.keeps_optimizer:
        check_optimizer(layouts, choice, config)
        check_flat(newest, choice, flat)
    rebuilds = rebuilds_main_params(layouts, config)
    mains = _read_with_models(layouts, config, choice, kinds)
    recipes = _recipes(newest, replace(config, rebuild_main_params=rebuilds), choice, mains)
    if all(recipe.rule is Rule.COPY for recipe in recipes):
        raise UsageError(f"{newest.path}: nothing is left to merge; see --drop and --copy")
    check_inputs(layouts, recipes)
    _check_stored(newest, recipes)
    warn_of_remainders(newest, kinds, config)
    flat = replace(flat, places=flat.places | find_fragments(newest))
    placed = [
        ((location.file, location.offset, task.region.offsets), task)
        for recipe in recipes
        for location, task in _tasks(recipe, newest, choice, flat, kinds, config)
    ]
    check_whole(task for _, task in placed)
    placed.sort(key=lambda pair: pair[0])
    tasks = [task for _, task in placed]
    used = dict.fromkeys(task.recipe for task in tasks)
    return MergePlan(tuple(used), tuple(tasks), tuple(sorted(choice.left_out)), rebuilds)


def _check_stored(newest: Layout, recipes: Iterable[Recipe]) -> None:
    """Raise ``UsageError`` where a tensor is of a dtype that is neither read nor written."""
    for output in (output for recipe in recipes for output in recipe.outputs):
        if output.dtype not in STORED:
            raise UsageError(
                f"{newest.path}: {output.key} is {output.dtype}, which is neither read nor "
                f"written; leave it out with --drop {output.key!r}"
            )


def check_whole(tasks: Iterable[Task]) -> None:
    """Raise ``MergeError`` unless what tasks write tiles every tensor that they write of."""
    shapes: dict[str, tuple[int, ...]] = {}
    written: dict[str, list[Region]] = {}
    for task in tasks:
        for output in task.recipe.outputs:
            shapes[output.key] = output.shape
            written.setdefault(output.key, []).append(task.part(output.key, task.region))
    for key, regions in written.items():
        if fault := tiling_fault(shapes[key], tuple(sorted(regions))):
            raise MergeError(
                f"{key} {shapes[key]} would not be whole in the merge: {fault}; nothing is "
                "written. Please report this, with the output of wsm plan"
            )


def kept_objects(layout: Layout, config: MergeConfig) -> tuple[str, ...]:
    """Byte entries that a merged checkpoint takes over from its newest source, as they are."""
    choice = choose(layout, config)
    check_unknown(layout, choice)
    return tuple(
        key
        for key, entry in layout.objects.items()
        if key not in choice.left_out and entry.role is not Role.COMMON
    )


Mains = Mapping[str, tuple[TensorEntry, Representation]]
"""Keyed main params that are read with their model tensors, by these, and how each is kept."""


def _read_with_models(
    layouts: Sequence[Layout], config: MergeConfig, choice: Choice, kinds: Kinds
) -> Mains:
    """Those that are kept; where none are, those that say more of the weights than the model."""
    newest = layouts[-1]
    found, lacking = {}, []
    for key, entry in newest.tensors.items():
        model = newest.tensors.get(main_of(key) or "")
        if entry.role is not Role.MAIN or model is None or model.key in choice.left_out:
            continue
        if is_fragmented(entry, model):
            continue  # found by its place
        kind = kinds.of(entry)
        if key not in choice.left_out:
            found[model.key] = entry, kind
        elif _is_finer(key, kind, config) and model.dtype in MERGEABLE:
            others = [layout.tensors.get(key) for layout in layouts]
            if all(o and (o.dtype, o.shape) == (entry.dtype, model.shape) for o in others):
                found[model.key] = entry, kind
            else:
                lacking.append(model.key)
    if lacking:
        logger.warning(
            "%s: not all sources have main params for %s as it has; merged from the model tensors, "
            "which are less exact", newest.path, some(sorted(lacking)),
        )  # fmt: skip
    return found


def _is_finer(main: str, kind: Representation, config: MergeConfig) -> bool:
    """A main param is merged, although no optimizer state is kept; ``--drop`` can name it."""
    return kind.finer and not config.keeps_optimizer and not matches(main, config.drop)


def _goes_with(recipe: Recipe, bucket: TensorEntry, kinds: Kinds, config: MergeConfig) -> bool:
    """Whether a model tensor is done together with its main param in a flat bucket."""
    if config.keeps_optimizer:
        return True
    return recipe.rule is not Rule.COPY and _is_finer(bucket.key, kinds.of(bucket), config)


def _recipes(newest: Layout, config: MergeConfig, choice: Choice, mains: Mains) -> list[Recipe]:
    kept = {key: entry for key, entry in newest.tensors.items() if key not in choice.left_out}
    recipes = []
    for key, entry in kept.items():
        if entry.role is Role.MAIN and main_of(key) in kept:
            continue  # comes with its model tensor
        copied = _is_copied(entry, config, choice)
        if entry.role is Role.MAIN and entry.dtype not in MERGEABLE:
            recipes.append(replace(_single(entry, True, config), clears=True))
        elif key not in mains or (copied and not config.keeps_optimizer):
            recipes.append(_single(entry, copied, config))
        elif entry.dtype in MERGEABLE:
            main, kind = mains[key]
            recipes.append(_pair(main, entry, copied, config, kind))
        else:  # no rounding makes it from its main param: both are copied
            recipes += [_single(entry, True, config), _single(mains[key][0], True, config)]
    return recipes


def _pair(
    main: TensorEntry,
    model: TensorEntry,
    copied: bool,
    config: MergeConfig,
    kind: Representation,
) -> Recipe:
    dtype = model.dtype if copied else _model_dtype(model, config)
    outputs: tuple[Output, ...] = (_output(main, main.dtype), _output(model, dtype))
    if config.rebuild_main_params:
        rule = Rule.COPY if copied else Rule.SUM_MODEL
        return Recipe(rule, Role.MODEL, (model.key,), outputs, (model.dtype,), kind)
    rule = Rule.COPY if copied else Rule.SUM_MAIN
    inputs, dtypes = (main.key, model.key), (main.dtype, model.dtype)
    if not config.keeps_optimizer:
        outputs = outputs[1:]
    return Recipe(rule, Role.MODEL, inputs, outputs, dtypes, kind)


def _single(entry: TensorEntry, copied: bool, config: MergeConfig) -> Recipe:
    rule, dtype = (Rule.COPY, entry.dtype) if copied else (Rule.SUM, _model_dtype(entry, config))
    return Recipe(rule, entry.role, (entry.key,), (_output(entry, dtype),), (entry.dtype,))


def _is_copied(entry: TensorEntry, config: MergeConfig, choice: Choice) -> bool:
    return (
        entry.key in choice.copied
        or entry.role in (Role.COPY, Role.OPTIMIZER, Role.RNG)
        or (entry.role is Role.BUFFER and config.buffers == "last")
        or (entry.role is Role.MOMENT and config.optimizer_state == "last")
    )


def _model_dtype(entry: TensorEntry, config: MergeConfig) -> torch.dtype:
    return _DTYPES.get(config.dtype, entry.dtype) if entry.role is Role.MODEL else entry.dtype


def _output(entry: TensorEntry, dtype: torch.dtype) -> Output:
    return Output(entry.key, dtype, entry.shape)


def _tasks(
    recipe: Recipe,
    newest: Layout,
    choice: Choice,
    flat: FlatMainParams,
    kinds: Kinds,
    config: MergeConfig,
) -> Iterator[tuple[Location, Task]]:
    """Tasks of one recipe, by chunk of the newest source, and where each chunk lies."""
    entry = newest.tensors[recipe.inputs[-1]]
    if recipe.role is Role.MOMENT:
        flat = _copied_moments(recipe, choice, flat)
    for chunk in entry.chunks:
        whole = Region(chunk.offsets, chunk.sizes)
        main = flat.places.get((entry.key, whole)) if len(recipe.inputs) == 1 else None
        bucket = None if main is None else newest.tensors[main.bucket]
        if bucket is not None and _goes_with(recipe, bucket, kinds, config):
            pair = _flat_pair(recipe, bucket, kinds.of(bucket), config)
            tasks: Iterable[Task] = [Task(pair, whole, main)]
        elif is_flat_bucket(entry.key):
            tasks = _bucket_tasks(recipe, whole, flat)
        else:
            tasks = [Task(recipe, whole)]
        for task in tasks:
            for part in task.split(CHUNK_ELEMENTS):
                yield chunk.location, part


def _bucket_tasks(recipe: Recipe, whole: Region, flat: FlatMainParams) -> Iterator[Task]:
    """What of a flat bucket's chunk is done for itself; main params go with their model."""
    for part in flat.rest(recipe.key, whole):
        yield Task(recipe, part)
    if recipe.role is Role.MOMENT:
        copy = replace(recipe, rule=Rule.COPY)
        for (_, region), place in flat.places.items():
            common = Region((place.start,), (region.numel,)).intersect(whole)
            if common is not None:
                yield Task(copy, common)


def _copied_moments(recipe: Recipe, choice: Choice, flat: FlatMainParams) -> FlatMainParams:
    """Where in a flat bucket that is merged the moments of copied model tensors lie."""
    if recipe.rule is Rule.COPY or not choice.copied:
        return FlatMainParams()
    mains = main_params_beside(recipe.key)
    return FlatMainParams(
        {
            chunk: FlatMainParam(recipe.key, place.start)
            for chunk, place in flat.places.items()
            if place.bucket == mains and chunk[0] in choice.copied
        }
    )


def _flat_pair(
    recipe: Recipe, bucket: TensorEntry, kind: Representation, config: MergeConfig
) -> Recipe:
    """A model tensor with its main param, which lies in a flat bucket: rounded from it, or both
    copied."""
    main = (_output(bucket, bucket.dtype),) if config.keeps_optimizer else ()
    return Recipe(
        Rule.COPY if recipe.rule is Rule.COPY else Rule.SUM_MAIN,
        recipe.role,
        (bucket.key, *recipe.inputs),
        (*main, *recipe.outputs),
        (bucket.dtype, *recipe.input_dtypes),
        kind,
    )
