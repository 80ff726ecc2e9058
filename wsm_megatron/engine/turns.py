"""What a step takes in, sums, hands on and writes, and what that costs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from wsm_megatron.engine.holders import Held, Step, steps_of
from wsm_megatron.engine.recipe import Rule, Task
from wsm_megatron.engine.tile import Merge

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


def sources_of(step: Step, merges: Sequence[Merge]) -> list[int]:
    """Sources that the step reads; others may be in the plan for merges made already."""
    used = {j for merge in merges for j in merge.members}
    return [j for j in range(step.first, step.last + 1) if j in used]


def cost_of(
    held: Sequence[Held], steps: Sequence[Step], checks: Sequence[Place], merges: Sequence[Merge]
) -> int:
    """Bytes that :meth:`Chain.run` reads and writes."""
    total = 0
    for step in steps:
        task, written = held[step.number].task, len(ending(step, merges))
        copied = task.recipe.rule is Rule.COPY
        read = min(1, written) if copied else len(sources_of(step, merges))
        total += task.box.numel * cost(task, read, written)
    for number, _ in checks:
        task = held[number].task
        total += task.box.numel * task.recipe.input_dtypes[1].itemsize
    return total


def bytes_sent(held: Sequence[Held], merges: Sequence[Merge]) -> int:
    """Bytes that go from rank to rank."""
    sums = ((one.task, s) for n, one in enumerate(held) if one.travels for s in steps_of(n, one))
    return sum(8 * task.box.numel * len(leaving(step, merges)) for task, step in sums)


def cost(task: Task, sources: int, merges: int) -> int:
    """Bytes read and written for one element; the model tensors of main params do not count."""
    outputs = sum(output.dtype.itemsize for output in task.recipe.outputs)
    return sources * task.recipe.input_dtypes[0].itemsize + merges * outputs


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
