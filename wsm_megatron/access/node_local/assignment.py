"""Who reads what where ranks see different files. Pure.

A task needs files of every source. The rank that sees those of one source *holds* that source for
the task; a run of consecutive sources with one holder is a *step*. The steps of a task are a chain:
each takes the float64 sums of the one before, goes on with its own sources, and hands them on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from wsm_megatron.checkpoint.chunk_index import ChunkIndex
from wsm_megatron.checkpoint.layout import Chunk, Layout
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.errors import MergeError
from wsm_megatron.planning.tasks import Rule, Task

TRAVEL_ELEMENTS = 2 * 2**20
"""Most float64 sums of a task that go from rank to rank in one message, over all merges together:
16 MiB a thread."""

Seeing = Sequence[Mapping[str, tuple[int, ...]]]
"""For every source, the ranks that see each of its files."""


@dataclass(frozen=True)
class TaskAssignment:
    """A task, and who reads what of it.

    Attributes:
        holders: the rank that reads each source; None for one that nothing is copied from.
        checkers: where main params are merged, the rank that reads each source's model tensor, to
            check that they belong together; otherwise empty.
    """

    task: Task
    holders: tuple[int | None, ...]
    checkers: tuple[int, ...] = ()

    @property
    def alone(self) -> int | None:
        """The rank that merges the task by itself, if one does."""
        ranks = {*self.holders, *self.checkers}
        return None if len(ranks) > 1 or self.task.recipe.rule is Rule.COPY else ranks.pop()

    @property
    def travels(self) -> bool:
        """Sums go from rank to rank."""
        return self.task.recipe.rule is not Rule.COPY and len(set(self.holders)) > 1

    def inputs(self, rank: int, j: int) -> int:
        """How many of the task's inputs a rank reads of a source that it holds: the summed tensor,
        and the model tensor where this rank checks it.
        """
        recipe = self.task.recipe
        checked = bool(self.checkers) and self.checkers[j] == rank
        return len(recipe.inputs) if checked or recipe.indivisible else 1

    def only(self, sources: Sequence[int], newest: Collection[int]) -> TaskAssignment:
        """The same for some of the sources, of which ``newest`` are copied from."""
        copied = self.task.recipe.rule is Rule.COPY
        return TaskAssignment(
            self.task,
            tuple(self.holders[j] if j in newest or not copied else None for j in sources),
            tuple(self.checkers[j] for j in sources) if self.checkers else (),
        )

    @property
    def checked_apart(self) -> bool:
        """Some main param is read by another rank than its model tensor."""
        return any(self.holders[j] != rank for j, rank in enumerate(self.checkers))


@dataclass(frozen=True)
class PeerStage:
    """A rank's turn in a task: the sources ``first .. last``, both included.

    Attributes:
        number: of the task, in the plan's order.
        before: the rank that the sums come from. after: the one that they go to.
    """

    number: int
    rank: int
    first: int
    last: int
    before: int | None = None
    after: int | None = None

    @property
    def sources(self) -> range:
        return range(self.first, self.last + 1)


def peer_stages_of(number: int, held: TaskAssignment) -> list[PeerStage]:
    """The steps of a task, in order."""
    steps: list[PeerStage] = []
    for j, rank in enumerate(held.holders):
        if rank is None:
            continue
        if steps and steps[-1].rank == rank and held.task.recipe.rule is not Rule.COPY:
            steps[-1] = replace(steps[-1], last=j)
        else:
            steps.append(PeerStage(number, rank, j, j))
    if held.task.recipe.rule is Rule.COPY:
        return steps
    ranks = [None, *(step.rank for step in steps), None]
    return [replace(s, before=ranks[i], after=ranks[i + 2]) for i, s in enumerate(steps)]


class Assigner:
    """Chooses the holders of tasks: as few hops as can be, then equal bytes.

    Args:
        seeing: who sees which files.
        newest: sources that entries are copied from.
        ranks: how many there are. merges: how many are made at once.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        seeing: Seeing,
        newest: Iterable[int],
        ranks: int,
        merges: int,
    ):
        self._layouts, self._seeing, self._newest = layouts, seeing, frozenset(newest)
        self._most = max(1, TRAVEL_ELEMENTS // merges)
        self._load = [0] * ranks
        self._indices: list[dict[str, ChunkIndex]] = [{} for _ in layouts]

    def hold(self, tasks: Iterable[Task]) -> Iterator[TaskAssignment]:
        """Every task with its holders, cut where no rank sees enough of a source for all of it.

        Raises:
            MergeError: no rank sees what a task needs. Names checkpoint, tensor, files and ranks.
        """
        for task in tasks:
            yield from self._hold(task)

    def object(self, j: int, key: str) -> int:
        """The rank that copies an object entry of source ``j``.

        Raises:
            MergeError: no rank sees its file.
        """
        location = self._layouts[j].objects[key].location
        ranks = self._seeing[j].get(location.file, ())
        if not ranks:
            raise MergeError(
                f"{self._layouts[j].path}: no rank sees {location.file}, which holds {key}; copy "
                "it to a node that takes part"
            )
        return self._least(ranks, location.length)

    def _hold(self, task: Task) -> Iterator[TaskAssignment]:
        copied = task.recipe.rule is Rule.COPY
        keys = task.recipe.inputs
        wanted = sorted(self._newest) if copied else range(len(self._layouts))
        able: dict[str, dict[int, tuple[int, ...]]] = {key: {} for key in keys}
        for j in wanted:
            for key in keys:
                chunks = self._chunks(j, key, task.part(key, task.region))
                able[key][j] = self._who_sees(j, chunks)
                if not able[key][j]:
                    for part in self._cut(task, j, key, chunks):
                        yield from self._hold(part)
                    return
        if task.recipe.indivisible:
            able = {keys[-1]: self._who_sees_all(task, able)}
        held = self._choose(task, *able.values())
        if not held.travels:
            yield held
            return
        for part in task.split(self._most):
            yield replace(held, task=part)

    def _who_sees_all(
        self, task: Task, able: Mapping[str, Mapping[int, tuple[int, ...]]]
    ) -> dict[int, tuple[int, ...]]:
        """Ranks that see a main param and its model tensor: both are read by one."""
        first, *others = able.values()
        both = {
            j: tuple(rank for rank in ranks if all(rank in other[j] for other in others))
            for j, ranks in first.items()
        }
        copied = task.recipe.rule is Rule.COPY
        together = "copied together" if copied else "read together"
        for j, ranks in both.items():
            if not ranks:
                raise MergeError(
                    f"{self._layouts[j].path}: {' and '.join(able)} at {task.region.offsets} are "
                    f"{together}, and no rank sees the files of both; copy these to one node"
                )
        return both

    def _choose(
        self,
        task: Task,
        able: Mapping[int, tuple[int, ...]],
        model: Mapping[int, tuple[int, ...]] | None = None,
    ) -> TaskAssignment:
        """Each holder goes on as far as it can: no choice makes fewer hops."""
        nbytes = [task.region.numel * dtype.itemsize for dtype in task.recipe.input_dtypes]
        holders: list[int | None] = [None] * len(self._layouts)
        waiting = sorted(able)
        while waiting:
            reach = {rank: _reach(rank, waiting, able) for rank in able[waiting[0]]}
            count = max(reach.values())
            farthest = [rank for rank in reach if reach[rank] == count]
            rank = self._least(self._nearest(farthest, waiting[:count], model), count * nbytes[0])
            for j in waiting[:count]:
                holders[j] = rank
            waiting = waiting[count:]
        checkers = []
        for j, ranks in (model or {}).items():
            near = [holders[j]] if holders[j] in ranks else ranks
            checkers.append(self._least([rank for rank in near if rank is not None], nbytes[1]))
        return TaskAssignment(task, tuple(holders), tuple(checkers))

    def _nearest(
        self,
        ranks: list[int],
        sources: list[int],
        model: Mapping[int, tuple[int, ...]] | None,
    ) -> list[int]:
        """Those of equal reach that see most of the model tensors to be checked."""
        if model is None:
            return ranks
        seen = {rank: sum(rank in model[j] for j in sources) for rank in ranks}
        return [rank for rank in ranks if seen[rank] == max(seen.values())]

    def _least(self, ranks: Sequence[int], nbytes: int) -> int:
        """The rank with least to do, which gets more."""
        rank = min(ranks, key=lambda rank: (self._load[rank], rank))
        self._load[rank] += nbytes
        return rank

    def _chunks(self, j: int, key: str, region: Region) -> list[Chunk]:
        index = self._indices[j].get(key)
        if index is None:
            index = self._indices[j][key] = ChunkIndex(self._layouts[j].tensors[key])
        return index.overlapping(region)

    def _who_sees(self, j: int, chunks: list[Chunk]) -> tuple[int, ...]:
        """The ranks that see the files of all chunks."""
        if len(chunks) == 1:
            return self._seeing[j].get(chunks[0].location.file, ())
        files = {chunk.location.file for chunk in chunks}
        first, *others = [self._seeing[j].get(file, ()) for file in files] or [()]
        return tuple(rank for rank in first if all(rank in other for other in others))

    def _cut(self, task: Task, j: int, key: str, chunks: list[Chunk]) -> list[Task]:
        """The task along the chunks of a source of which no rank sees enough."""
        regions = [
            task.region.intersect(Region(c.offsets, c.sizes)) for c in chunks if task.flat is None
        ]
        if len(regions) < 2:
            raise MergeError(self._refusal(task, j, key, chunks))
        return [replace(task, region=region) for region in regions if region is not None]

    def _refusal(self, task: Task, j: int, key: str, chunks: list[Chunk]) -> str:
        path, region = self._layouts[j].path, task.part(key, task.region)
        files = sorted({chunk.location.file for chunk in chunks})
        if not files:
            return f"{path}: no chunk of {key} at {region.offsets}; the checkpoint is incomplete"
        who = "; ".join(
            f"{file}: {_named(self._seeing[j].get(file, ()))}" for file in files[:_LISTED]
        )
        more = f"; {len(files) - _LISTED} more" if len(files) > _LISTED else ""
        return (
            f"{path}: no rank sees all files that {key} at {region.offsets} needs ({who}{more}); "
            "let the nodes that have them take part, copy them to one that does, or leave this "
            "checkpoint out"
        )


_LISTED = 8


def _reach(rank: int, waiting: list[int], able: Mapping[int, tuple[int, ...]]) -> int:
    """How many of the next sources a rank can hold."""
    return next((i for i, j in enumerate(waiting) if rank not in able[j]), len(waiting))


def _named(ranks: Sequence[int]) -> str:
    if not ranks:
        return "no rank"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
