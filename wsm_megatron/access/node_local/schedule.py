"""What each rank does of a task that several do together, and in which order they talk. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from wsm_megatron.access.node_local.assignment import PeerStage, TaskAssignment, peer_stages_of
from wsm_megatron.planning.tasks import Merge, Rule, Scope

Place = tuple[int, int]
"""A task and a source, or a task and a merge, by number."""


def arriving(step: PeerStage, merges: Sequence[Merge]) -> list[int]:
    """Merges whose sums the step takes in."""
    return [
        k for k, m in enumerate(merges) if m.source_indices[0] < step.first <= m.source_indices[-1]
    ]


def leaving(step: PeerStage, merges: Sequence[Merge]) -> list[int]:
    """Merges whose sums the step hands on."""
    return [
        k for k, m in enumerate(merges) if m.source_indices[0] <= step.last < m.source_indices[-1]
    ]


def ending(step: PeerStage, merges: Sequence[Merge]) -> list[int]:
    """Merges that the step finishes, and writes."""
    return [k for k, m in enumerate(merges) if step.first <= m.source_indices[-1] <= step.last]


def scope_of(step: PeerStage, held: TaskAssignment, merges: Sequence[Merge]) -> Scope:
    """What a step reads, takes in, hands on and finishes."""
    recipe, sources = held.task.recipe, tuple(step.sources)
    ends = tuple(ending(step, merges))
    if recipe.rule is Rule.COPY:
        return Scope(sources, ends)
    return Scope(
        sources,
        ends,
        tuple(arriving(step, merges)),
        tuple(leaving(step, merges)),
        tuple(j for j in sources if held.inputs(step.rank, j) < len(recipe.inputs)),
    )


def check_bytes(held: Sequence[TaskAssignment], checks: Sequence[Place]) -> int:
    """Bytes of the model tensors that are read to check other ranks' main params."""
    tasks = (held[number].task for number, _ in checks)
    return sum(task.region.numel * task.recipe.input_dtypes[1].itemsize for task in tasks)


def bytes_sent(held: Sequence[TaskAssignment], merges: Sequence[Merge]) -> int:
    """Bytes that go from rank to rank."""
    sums = (
        (one.task, s) for n, one in enumerate(held) if one.travels for s in peer_stages_of(n, one)
    )
    return sum(8 * task.region.numel * len(leaving(step, merges)) for task, step in sums)


def tickets_of(
    steps: Sequence[PeerStage], merges: Sequence[Merge]
) -> dict[tuple[int, int, str], tuple[int, int]]:
    """Peer and ticket of every message, by task, first source, and which way it goes."""
    turns: Counter[int] = Counter()
    tickets = {}
    for step in steps:
        ways = (
            ("before", step.before, arriving(step, merges)),
            ("after", step.after, leaving(step, merges)),
        )
        for way, peer, sums in ways:
            if peer is not None and sums:
                tickets[step.number, step.first, way] = peer, turns[peer]
                turns[peer] += 1
    return tickets
