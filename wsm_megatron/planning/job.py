"""A merge job: everything decided before the first tensor byte is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.format import marker_for
from wsm_megatron.checkpoint.layout import COMMON_KEY, Layout
from wsm_megatron.checkpoint.region import Box
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.checkpoint.side_files import Files, copy_side_files
from wsm_megatron.checkpoint.writer import Item, Placed, place
from wsm_megatron.config import ExecutionOptions, MergeConfig
from wsm_megatron.planning.plan import MergePlan
from wsm_megatron.planning.sources import Source
from wsm_megatron.planning.tasks import Merge, Task, bytes_read, costs
from wsm_megatron.schedule.coefficients import MergeCoefficients


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
    decay: MergeCoefficients
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
        side_files: products, by number, whose side files it copies.
        nbytes: bytes that it reads and writes, by itself and with others.
    """

    tasks: Sequence[Task]
    written: Sequence[Sequence[Task]]
    objects: Sequence[Sequence[str]]
    side_files: Sequence[int]
    nbytes: int


@dataclass(frozen=True)
class Job:
    """Sources, what is made of them, and the plan that all products share.

    Attributes:
        dealt_for: what the ranks' shares were cut for, where some of its products are left out:
            those that remain keep their places in the ranks' files.
    """

    config: MergeConfig
    sources: tuple[Source, ...]
    products: tuple[Product, ...]
    plan: MergePlan
    dealt_for: tuple[Merge, ...] = ()
    execution: ExecutionOptions = ExecutionOptions()

    def iterations(self, product: Product) -> tuple[int, ...]:
        return tuple(self.sources[j].iteration for j in product.members)

    def newest(self, product: Product) -> Layout:
        return self.sources[product.newest].layout

    @property
    def merges(self) -> list[Merge]:
        return [product.merge for product in self.products]

    def only(self, products: Sequence[int]) -> Job:
        """The same job for some of its products, and the sources that these are of."""
        kept, used = [self.products[k] for k in products], self.used_by(products)
        place = {j: n for n, j in enumerate(used)}
        return replace(
            self,
            sources=tuple(self.sources[j] for j in used),
            products=tuple(replace(p, members=tuple(place[j] for j in p.members)) for p in kept),
            dealt_for=self.dealt_for or tuple(self.merges),
        )

    def used_by(self, products: Sequence[int]) -> list[int]:
        """The sources that some of its products are of."""
        return sorted({j for k in products for j in self.products[k].members})

    def parts(self, ranks: int) -> tuple[Part, ...]:
        """What every rank does where all see all files: rank 0 also what is no tensor."""
        shares = self.plan.shares(ranks, self.dealt_for or self.merges)
        every = [product.objects for product in self.products]
        none: list[tuple[str, ...]] = [() for _ in every]
        return tuple(
            self.part(
                rank,
                share,
                [share] * len(every),
                none if rank else every,
                () if rank else range(len(every)),
            )
            for rank, share in enumerate(shares)
        )

    def part(
        self,
        rank: int,
        tasks: Sequence[Task],
        written: Sequence[Sequence[Task]],
        objects: Sequence[Sequence[str]],
        side_files: Sequence[int],
        more: int = 0,
    ) -> Part:
        """A rank's part. ``more``: bytes that it reads and writes with other ranks."""
        nbytes = sum(costs(tasks, self.merges)) + self._objects_read(objects)
        nbytes += self._objects_written(objects, rank == 0) + more
        return Part(tasks, written, objects, side_files, nbytes)

    def bytes_to_read(self) -> int:
        """Bytes of tensors and objects, over all ranks."""
        objects = [product.objects for product in self.products]
        return sum(bytes_read(self.plan.tasks, self.merges)) + self._objects_read(objects)

    def bytes_to_write(self) -> int:
        """Bytes of all products' tensors, objects and side files."""
        objects = [product.objects for product in self.products]
        tensors = self.plan.bytes_to_write() * len(self.products)
        beside = sum(self.sources[product.newest].beside.nbytes for product in self.products)
        return tensors + self._objects_written(objects, True) + beside

    def stored_bytes(self) -> list[int]:
        """Bytes that each product takes up: containers, objects, common state, side files."""
        tensors = sum(item.stored_bytes for item in chunks_of(self.plan.tasks))
        return [tensors + self._beside_tensors(product) for product in self.products]

    def _beside_tensors(self, product: Product) -> int:
        objects = sum(item.nbytes for item in self._objects(product, product.objects, True))
        common = 0 if product.in_distcp else len(product.common)
        return objects + common + self.sources[product.newest].beside.nbytes

    def copy_beside(self, product: Product, directory: Path) -> Files:
        """Copy what lies beside the newest source's tensors; size and CRC-32 of the copies."""
        source, kept = self.sources[product.newest], self.config.keeps_optimizer
        return copy_side_files(source.path, source.beside, directory, product.iteration, kept)

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
