"""Merges that are never written: model tensors in memory, for an evaluator in Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.execution.rank import default_threads
from wsm_megatron.execution.value_checks import wrong_main
from wsm_megatron.kernels import weighted_sum
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.tasks import VALUE, Rule, Task
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.retry import check_storage

Tensors = dict[str, torch.Tensor]
"""By the keys of the checkpoint, whole, on the CPU."""


class InMemoryMerges:
    """Sources read once, and held; merges of them with any coefficients.

    The bits are those of a merge that is written. Takes the memory of all sources' weights and of
    one merge.

    Args:
        job: of one merge, without optimizer state.

    Raises:
        UsageError: the job keeps optimizer state. MergeError: a source is damaged.
    """

    def __init__(self, job: Job):
        if job.config.keeps_optimizer:
            raise UsageError("a merge in memory is of weights alone: --optimizer-state drop")
        self._tasks, self._newest = job.plan.tasks, job.outputs[0].newest
        readers = [CheckpointReader(one.layout, job.execution.retries) for one in job.sources]
        self._threads = job.execution.threads or default_threads()
        self._summands: dict[int, list[torch.Tensor]] = {}
        try:
            self._run(lambda n: self._read(n, readers))
            for reader in readers:
                reader.verify()
        finally:
            for reader in readers:
                reader.close()
        outputs = {o.key: o for task in self._tasks for o in task.recipe.outputs}
        self._merged = {key: torch.empty(o.shape, dtype=o.dtype) for key, o in outputs.items()}

    def tensors(self, coefficients: Sequence[float]) -> Tensors:
        """The merged tensors, valid until the next call, which fills them anew.

        Raises:
            MergeError: one is not finite.
        """
        self._run(lambda n: self._merge(n, coefficients))
        return self._merged

    def _run(self, work: Callable[[int], None]) -> None:
        run_workers(range(len(self._tasks)), work, self._threads, threading.Event(), check_storage)

    def _read(self, n: int, readers: Sequence[CheckpointReader]) -> None:
        task = self._tasks[n]
        copied = task.recipe.rule is Rule.COPY
        wanted = [readers[self._newest]] if copied else readers
        self._summands[n] = [_summand(task, reader) for reader in wanted]

    def _merge(self, n: int, coefficients: Sequence[float]) -> None:
        task, summands = self._tasks[n], self._summands[n]
        recipe, region = task.recipe, task.region
        (output,) = recipe.outputs
        if recipe.rule is Rule.COPY:
            merged = summands[0]
        else:
            summed = torch.empty(region.numel, dtype=VALUE if recipe.splits else output.dtype)
            finite = weighted_sum(summands, [list(coefficients)], [summed])
            merged = summed
            if recipe.splits:
                merged = torch.empty(region.numel, dtype=output.dtype)
                finite = bool(recipe.main.write(summed, None, merged)) and finite
            if not finite:
                raise MergeError(f"{output.key} of the merge is not finite")
        where = tuple(
            slice(a, a + size) for a, size in zip(region.offsets, region.sizes, strict=True)
        )
        self._merged[output.key][where] = merged.view(region.sizes)


def _summand(task: Task, reader: CheckpointReader) -> torch.Tensor:
    """What is summed of one source, or copied."""
    recipe = task.recipe
    read = []
    for key in recipe.inputs:
        place = task.part(key, task.region)
        elements = torch.empty(place.numel, dtype=reader.layout.tensors[key].dtype)
        region = reader.region_reader(key, place)
        region.read(place, Buffer(elements))
        region.finish()
        read.append(elements)
    if len(read) > 1 and bool(recipe.main.differ(*read)):
        raise wrong_main(task, reader.layout)
    if recipe.rebuilds:
        main, model = read
        value = torch.empty(task.region.numel, dtype=VALUE)
        recipe.main.rebuild(main, model, value)
        return value
    return read[0]
