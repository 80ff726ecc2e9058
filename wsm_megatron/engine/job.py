"""A merge job: everything decided before the first tensor byte is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.box import Box
from wsm_megatron.checkpoint.common import dump_common, load_common, prepare
from wsm_megatron.checkpoint.format import for_common_file, marker_for, without_rerun_state
from wsm_megatron.checkpoint.layout import COMMON_KEY, Layout
from wsm_megatron.checkpoint.run import checkpoint_path
from wsm_megatron.checkpoint.writer import Item, Placed, place
from wsm_megatron.config import MergeConfig
from wsm_megatron.engine.flags import describe_resume
from wsm_megatron.engine.flat import find_flat_mains
from wsm_megatron.engine.plan import MergePlan, Rule, Task, check_entry, kept_objects, make_plan
from wsm_megatron.engine.provenance import describe, describe_source
from wsm_megatron.engine.sources import (
    Decay,
    Source,
    decay_over,
    open_source,
    read_common,
    select_checkpoints,
)
from wsm_megatron.engine.tile import Merge
from wsm_megatron.window import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    """One merged checkpoint of a job.

    Attributes:
        members: its sources, as indices into the job's, oldest first.
        objects: byte entries taken over from its newest source.
        common: its common state, ready to be written.
        in_distcp: the common state is an entry of the distcp files, not a file of its own.
    """

    root: Path
    iteration: int
    members: tuple[int, ...]
    decay: Decay
    objects: tuple[str, ...]
    common: bytes
    in_distcp: bool
    provenance: dict[str, Any]

    @property
    def path(self) -> Path:
        return checkpoint_path(self.root, self.iteration)

    @property
    def merge(self) -> Merge:
        return Merge(self.members, self.decay.coefficients)


@dataclass(frozen=True)
class Job:
    """Sources, what is made of them, and the plan that all products share."""

    config: MergeConfig
    sources: tuple[Source, ...]
    products: tuple[Product, ...]
    plan: MergePlan

    def iterations(self, product: Product) -> tuple[int, ...]:
        return tuple(self.sources[j].iteration for j in product.members)

    def newest(self, product: Product) -> Layout:
        return self.sources[product.members[-1]].layout

    def shares(self, ranks: int) -> tuple[tuple[Task, ...], ...]:
        """The tasks of every rank."""
        return self.plan.shares(ranks, len(self.sources), len(self.products))

    def cost(self, tasks: Sequence[Task]) -> int:
        """Bytes read and written by tasks."""
        sources, products = len(self.sources), len(self.products)
        return sum(task.box.numel * task.recipe.cost(sources, products) for task in tasks)

    def placed(self, product: Product, rank: int, tasks: Sequence[Task]) -> list[Placed]:
        """Everything that one rank stores for a product, in the order of its file."""
        return place([*self._objects(product, rank), *chunks_of(tasks)], rank)

    def bytes_to_write(self) -> int:
        """Bytes of all products' tensors and objects."""
        objects = sum(i.nbytes for product in self.products for i in self._objects(product, 0))
        return objects + self.plan.bytes_to_write() * len(self.products)

    def common_key(self, product: Product) -> str | None:
        """Key of the common state's entry; None where it is a file of its own."""
        return COMMON_KEY if product.in_distcp else None

    def marker(self, product: Product) -> dict[str, Any]:
        """What goes into ``metadata.json``."""
        return marker_for(self.newest(product).marker, product.in_distcp)

    def _objects(self, product: Product, rank: int) -> list[Item]:
        if rank != 0:
            return []
        layout = self.newest(product)
        items = [Item(key, nbytes=layout.objects[key].nbytes) for key in product.objects]
        if key := self.common_key(product):
            items.append(Item(key, nbytes=len(product.common)))
        return items


def prepare_job(config: MergeConfig) -> Job:
    """Select, open and plan. Reads metadata and common states only; writes nothing.

    Raises:
        ValueError: the options do not fit the run. MergeError: a checkpoint is damaged.
    """
    wanted = [
        (one, chosen) for one in _single_merges(config) for chosen in _selections(config, one)
    ]
    checkpoints = {c.iteration: c for _, chosen in wanted for c in chosen}
    sources = tuple(open_source(config.load, checkpoints[i]) for i in sorted(checkpoints))
    layouts = [source.layout for source in sources]
    flat = find_flat_mains(layouts[-1]) if config.keeps_optimizer else None
    plan = make_plan(layouts, config, flat)
    if plan.rebuilds_mains and not config.mains_from_model:
        logger.warning(
            "the sources keep their optimizer state differently: main params are rebuilt from the "
            "merged model, as with --mains-from-model"
        )
        config = replace(config, mains_from_model=True)
        wanted = [(replace(one, mains_from_model=True), chosen) for one, chosen in wanted]
    products = tuple(_product(config, one, chosen, sources) for one, chosen in wanted)
    job = Job(config, sources, products, plan)
    _check_copied(job)
    return job


def _check_copied(job: Job) -> None:
    """Every product's own newest source has what is copied from it."""
    copied = [recipe for recipe in job.plan.recipes if recipe.rule is Rule.COPY]
    for product in job.products:
        layout = job.newest(product)
        for recipe in copied:
            check_entry(layout, job.sources[-1].layout, recipe.key)


def _single_merges(config: MergeConfig) -> list[MergeConfig]:
    """A config for every window and decay, without sliding."""
    lengths = [
        {"window_iterations": i, "window_tokens": t}
        for i in _each(config.window_iterations)
        for t in _each(config.window_tokens)
    ]
    return [
        replace(config, decay=decay, sliding_every=None, **length)
        for length in lengths
        for decay in config.decays
    ]


def _each(values: tuple[int, ...] | None) -> list[Any]:
    return [None] if values is None else [(value,) for value in values]


def _selections(config: MergeConfig, one: MergeConfig) -> tuple[tuple[Checkpoint, ...], ...]:
    return select_checkpoints(config.load, one.windows[0], config.sliding_every)


def _root(config: MergeConfig, one: MergeConfig) -> Path:
    """``--save``; where it gets merges of several decays or windows, a folder for each."""
    names = []
    if len(config.decays) > 1:
        names.append(Path(one.decay).stem)
    if len(config.windows) > 1:
        for length, unit in ((one.window_iterations, "iterations"), (one.window_tokens, "tokens")):
            names += [f"{n}-{unit}" for n in length or ()]
    return config.save / "-".join(names) if names else config.save


def _product(
    whole: MergeConfig,
    config: MergeConfig,
    chosen: tuple[Checkpoint, ...],
    opened: tuple[Source, ...],
) -> Product:
    decay = decay_over(
        chosen, config.decay, config.min_decay, config.weights, config.allow_unnormalized
    )
    index = {source.iteration: j for j, source in enumerate(opened)}
    members = tuple(index[checkpoint.iteration] for checkpoint in chosen)
    sources = tuple(opened[j] for j in members)
    newest = sources[-1]
    iteration = newest.iteration if config.output_iteration is None else config.output_iteration
    before = load_common(*read_common(newest.path, newest.layout))
    provenance = describe(list(map(describe_source, sources)), decay, config, iteration)
    provenance["resume"] = describe_resume({**before, "iteration": iteration}, config)
    state = prepare(
        before,
        iteration=iteration,
        drop_optimizer=not config.keeps_optimizer,
        provenance=provenance,
    )
    was_in_distcp = newest.layout.common_entry is not None
    in_distcp = was_in_distcp if config.format == "same" else config.format == "0.19"
    objects = kept_objects(newest.layout, config)
    if in_distcp != was_in_distcp:
        state, objects = without_rerun_state(state, objects)
    if not in_distcp:
        state = for_common_file(state)
    return Product(
        root=_root(whole, config),
        iteration=iteration,
        members=members,
        decay=decay,
        objects=objects,
        common=dump_common(state, in_distcp=in_distcp),
        in_distcp=in_distcp,
        provenance=provenance,
    )


def chunks_of(tasks: Sequence[Task]) -> list[Item]:
    """What tasks write, in order."""
    return [
        Item(output.key, task.part(output.key, task.box), output.dtype, output.shape)
        for task in tasks
        for output in task.recipe.outputs
    ]


def places(placed: Sequence[Placed]) -> dict[tuple[str, Box], Placed]:
    """Chunks by key and box."""
    return {(one.item.key, one.item.box): one for one in placed if one.item.box is not None}
