"""What a step takes in, sums, hands on and writes, and what that costs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from wsm_megatron.access.node_local.assignment import Held, Step, steps_of
from wsm_megatron.planning.tasks import Merge

Place = tuple[int, int]
"""A task and a source, or a task and a merge, by number."""


def arriving(step: Step, merges: Sequence[Merge]) -> list[int]:
    """Merges whose sums the step takes in."""
    return [k for k, m in enumerate(merges) if m.members[0] < step.first <= m.members[-1]]


def leaving(step: Step, merges: Sequence[Merge]) -> list[int]:
    """Merges whose sums the step hands on."""
    return [k for k, m in enumerate(merges) if m.members[0] <= step.last < m.members[-1]]


def ending(step: Step, merges: Sequence[Merge]) -> list[int]:
    """Merges that the step finishes, and writes."""
    return [k for k, m in enumerate(merges) if step.first <= m.members[-1] <= step.last]


def cost(step: Step, held: Held, merges: Sequence[Merge]) -> int:
    """Bytes that a step of a task reads and writes for one element."""
    recipe = held.task.recipe
    read = (recipe.input_dtypes[: held.inputs(step.rank, j)] for j in step.sources)
    nbytes = sum(dtype.itemsize for dtypes in read for dtype in dtypes)
    return nbytes + recipe.cost(0, len(ending(step, merges)))


def cost_of(
    held: Sequence[Held], steps: Sequence[Step], checks: Sequence[Place], merges: Sequence[Merge]
) -> int:
    """Bytes that :meth:`Chain.run` reads and writes."""
    total = 0
    for step in steps:
        one = held[step.number]
        total += one.task.box.numel * cost(step, one, merges)
    for number, _ in checks:
        task = held[number].task
        total += task.box.numel * task.recipe.input_dtypes[1].itemsize
    return total


def bytes_sent(held: Sequence[Held], merges: Sequence[Merge]) -> int:
    """Bytes that go from rank to rank."""
    sums = ((one.task, s) for n, one in enumerate(held) if one.travels for s in steps_of(n, one))
    return sum(8 * task.box.numel * len(leaving(step, merges)) for task, step in sums)


def tickets_of(
    steps: Sequence[Step], merges: Sequence[Merge]
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
