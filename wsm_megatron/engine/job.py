"""A merge job: everything decided before the first tensor byte is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
from wsm_megatron.engine.compatible import check_entry
from wsm_megatron.engine.flags import describe_resume
from wsm_megatron.engine.flat import FlatMains, find_flat_mains
from wsm_megatron.engine.plan import MergePlan, kept_objects, make_plan
from wsm_megatron.engine.provenance import describe, describe_source
from wsm_megatron.engine.recipe import Merge, Rule, Task, bytes_read, costs
from wsm_megatron.engine.sources import (
    Decay,
    Fingerprint,
    Source,
    decay_over,
    open_source,
    read_common,
    select_checkpoints,
)
from wsm_megatron.engine.spread import Spread
from wsm_megatron.engine.turns import bytes_sent, cost_of
from wsm_megatron.garbage import no_collection
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
    def newest(self) -> int:
        return self.members[-1]

    @property
    def merge(self) -> Merge:
        return Merge(self.members, self.decay.coefficients)


@dataclass(frozen=True)
class Part:
    """What one rank does.

    Attributes:
        tasks: those that it does by itself.
        written: for every product, the tasks whose chunks it stores, in the order of its file.
        objects: for every product, the byte entries that it copies.
    """

    tasks: Sequence[Task]
    written: Sequence[Sequence[Task]]
    objects: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Job:
    """Sources, what is made of them, and the plan that all products share.

    Attributes:
        spread: which rank reads what, where they see different files.
    """

    config: MergeConfig
    sources: tuple[Source, ...]
    products: tuple[Product, ...]
    plan: MergePlan
    spread: Spread | None = None

    def iterations(self, product: Product) -> tuple[int, ...]:
        return tuple(self.sources[j].iteration for j in product.members)

    def newest(self, product: Product) -> Layout:
        return self.sources[product.newest].layout

    @property
    def merges(self) -> list[Merge]:
        return [product.merge for product in self.products]

    def only(self, products: Sequence[int]) -> Job:
        """The same job for some of its products, and the sources that these are of."""
        kept = [self.products[k] for k in products]
        used = sorted({j for product in kept for j in product.members})
        place = {j: n for n, j in enumerate(used)}
        newest = {product.newest for product in kept}
        return replace(
            self,
            sources=tuple(self.sources[j] for j in used),
            products=tuple(replace(p, members=tuple(place[j] for j in p.members)) for p in kept),
            spread=None if self.spread is None else self.spread.only(used, newest),
        )

    def parts(self, ranks: int) -> tuple[Part, ...]:
        """What every rank does."""
        if self.spread is not None:
            return self._parts_of(self.spread)
        shares = self.plan.shares(ranks, self.merges)
        objects = [product.objects for product in self.products]
        return tuple(
            Part(share, [share] * len(objects), [() if rank else keys for keys in objects])
            for rank, share in enumerate(shares)
        )

    def cost_of(self, rank: int, part: Part) -> int:
        """Bytes that a rank reads and writes, by itself and with others."""
        merges, spread = self.merges, self.spread
        nbytes = sum(costs(part.tasks, merges)) + self._objects_read(part.objects)
        nbytes += self._objects_written(part.objects, rank == 0)
        if spread is not None:
            nbytes += cost_of(spread.held, spread.steps(rank), spread.checks(rank), merges)
        return nbytes

    def bytes_to_read(self) -> int:
        """Bytes of tensors and objects, over all ranks."""
        objects = [product.objects for product in self.products]
        return sum(bytes_read(self.plan.tasks, self.merges)) + self._objects_read(objects)

    def bytes_to_write(self) -> int:
        """Bytes of all products' tensors and objects."""
        objects = [product.objects for product in self.products]
        tensors = self.plan.bytes_to_write() * len(self.products)
        return tensors + self._objects_written(objects, True)

    def bytes_to_send(self) -> int:
        """Bytes of sums that go from rank to rank."""
        return 0 if self.spread is None else bytes_sent(self.spread.held, self.merges)

    def fingerprint(self, j: int) -> Fingerprint | tuple[Fingerprint, ...]:
        """What tells one state of a source's files from another, on every rank that sees any."""
        return self.sources[j].fingerprint if self.spread is None else self.spread.fingerprints[j]

    def placed(self, k: int, rank: int, part: Part) -> list[Placed]:
        """Everything that one rank stores for product ``k``, in the order of its file."""
        items = self._objects(self.products[k], part.objects[k], rank == 0)
        return place([*items, *chunks_of(part.written[k])], rank)

    def takers(self, objects: Sequence[Sequence[str]]) -> dict[tuple[int, str], list[int]]:
        """Of byte entries that products copy: which products take each, by source and key."""
        takers: dict[tuple[int, str], list[int]] = {}
        for k, keys in enumerate(objects):
            for key in keys:
                takers.setdefault((self.products[k].newest, key), []).append(k)
        return takers

    def common_key(self, product: Product) -> str | None:
        """Key of the common state's entry; None where it is a file of its own."""
        return COMMON_KEY if product.in_distcp else None

    def marker(self, product: Product) -> dict[str, Any]:
        """What goes into ``metadata.json``."""
        return marker_for(self.newest(product).marker, product.in_distcp)

    def _objects(self, product: Product, keys: Sequence[str], with_common: bool) -> list[Item]:
        layout = self.newest(product)
        items = [Item(key, nbytes=layout.objects[key].nbytes) for key in keys]
        if with_common and (key := self.common_key(product)):
            items.append(Item(key, nbytes=len(product.common)))
        return items

    def _objects_read(self, objects: Sequence[Sequence[str]]) -> int:
        return sum(self.sources[j].layout.objects[key].nbytes for j, key in self.takers(objects))

    def _objects_written(self, objects: Sequence[Sequence[str]], with_common: bool) -> int:
        return sum(
            item.nbytes
            for product, keys in zip(self.products, objects, strict=True)
            for item in self._objects(product, keys, with_common)
        )

    def _parts_of(self, spread: Spread) -> tuple[Part, ...]:
        newest = [product.newest for product in self.products]
        written = {j: spread.written(j) for j in set(newest)}
        return tuple(
            Part(
                tasks,
                [written[j][rank] for j in newest],
                [
                    [key for key in product.objects if spread.objects[j][key] == rank]
                    for product, j in zip(self.products, newest, strict=True)
                ],
            )
            for rank, tasks in enumerate(spread.alone())
        )


Wanted = Sequence[tuple[MergeConfig, tuple[Checkpoint, ...]]]
"""Every single merge, and the checkpoints that it is of, oldest first."""


def prepare_job(config: MergeConfig) -> Job:
    """Select, open and plan. Reads metadata and common states only; writes nothing.

    Raises:
        ValueError: the options do not fit the run. MergeError: a checkpoint is damaged.
    """
    with no_collection():
        wanted = wanted_merges(
            config,
            lambda one: select_checkpoints(config.load, one.windows[0], config.sliding_every),
        )
        sources = tuple(open_source(config.load, checkpoint) for checkpoint in all_of(wanted))
        flat = find_flat_mains(sources[-1].layout) if config.keeps_optimizer else None
        return plan_job(config, wanted, sources, flat, lambda s: read_common(s.path, s.layout))


def plan_job(
    config: MergeConfig,
    wanted: Wanted,
    sources: tuple[Source, ...],
    flat: FlatMains | None,
    common_of: Callable[[Source], tuple[bytes, str]],
) -> Job:
    """:func:`prepare_job` once the sources are opened.

    Args:
        flat: main params in the newest source's flat buckets.
        common_of: a source's common state, as :func:`read_common` gives it.
    """
    layouts = [source.layout for source in sources]
    plan = make_plan(layouts, config, flat)
    if plan.rebuilds_mains and not config.mains_from_model:
        logger.warning(
            "the sources keep their optimizer state differently: main params are rebuilt from the "
            "merged model, as with --mains-from-model"
        )
        config = replace(config, mains_from_model=True)
        wanted = [(replace(one, mains_from_model=True), chosen) for one, chosen in wanted]
    products = tuple(_product(config, one, chosen, sources, common_of) for one, chosen in wanted)
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


def wanted_merges(
    config: MergeConfig, select: Callable[[MergeConfig], tuple[tuple[Checkpoint, ...], ...]]
) -> Wanted:
    """Every merge that a config asks for; ``select`` finds the checkpoints of one window."""
    return [(one, chosen) for one in _single_merges(config) for chosen in select(one)]


def all_of(wanted: Wanted) -> list[Checkpoint]:
    """All checkpoints of some merges, oldest first."""
    checkpoints = {c.iteration: c for _, chosen in wanted for c in chosen}
    return [checkpoints[i] for i in sorted(checkpoints)]


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
    common_of: Callable[[Source], tuple[bytes, str]],
) -> Product:
    decay = decay_over(
        chosen, config.decay, config.min_decay, config.weights, config.allow_unnormalized
    )
    index = {source.iteration: j for j, source in enumerate(opened)}
    members = tuple(index[checkpoint.iteration] for checkpoint in chosen)
    sources = tuple(opened[j] for j in members)
    newest = sources[-1]
    iteration = newest.iteration if config.output_iteration is None else config.output_iteration
    before = load_common(*common_of(newest))
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


def places(placed: Sequence[Placed]) -> dict[tuple[str, Box | None], Placed]:
    """By key and box, which objects have none of."""
    return {(one.item.key, one.item.box): one for one in placed}
