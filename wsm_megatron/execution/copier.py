"""Copying chunks of the newest sources: each is read once, and written for every merge it ends."""

from __future__ import annotations

import threading
from itertools import chain

from wsm_megatron.execution.context import Context, finish
from wsm_megatron.execution.targets import Target
from wsm_megatron.execution.tiles import Memory
from wsm_megatron.execution.value_checks import check_finite, wrong_main
from wsm_megatron.planning.tasks import Recipe, Task
from wsm_megatron.storage.buffer import Buffer


class Copier:
    """Does tasks whose rule is ``COPY``. Safe to share between threads."""

    def __init__(self, context: Context, stop: threading.Event):
        self._context, self._stop = context, stop
        self._targets: dict[int, list[Target]] = {}
        for merge, target in zip(context.merges, context.targets, strict=True):
            self._targets.setdefault(merge.newest, []).append(target)

    def copy(self, task: Task, j: int, memory: Memory, elements: int) -> None:
        """Copy a task's chunk of source ``j``, at most ``elements`` at a time, unless an earlier
        merge has.

        Raises:
            MergeError: values are not finite, or a main param is of other weights than its model.
        """
        context, phases, targets = self._context, self._context.phases, self._targets[j]
        with phases("resuming"):
            finished = all(target.has(task) for target in targets)
        if finished:
            context.leave_out(task, [j])
            for target in targets:
                target.take_over(task)
            context.progress(task.region.numel * task.recipe.cost(1, len(targets)))
            return
        with phases("reading"):
            region_readers = context.region_readers(task, j, len(task.recipe.inputs))
        writers = [target.chunks(task) for target in targets]
        for part in task.region.split(elements):
            if self._stop.is_set():
                return
            read, outputs = _buffers(task.recipe, memory, part.numel)
            with phases("reading"):
                for region_reader, (key, buffer) in zip(region_readers, read.items(), strict=True):
                    region_reader.read(task.part(key, part), buffer)
            with phases("reducing"):
                self._check(task, j, read)
                for output, buffer in zip(task.recipe.outputs, outputs, strict=True):
                    if output.key not in read:
                        model = read[task.recipe.copied_from(output)].elements
                        task.recipe.main.from_model(model, buffer.elements)
                    elif task.recipe.clears:
                        buffer.elements.zero_()
            with phases("writing"):
                for row in writers:
                    for writer, buffer in zip(row, outputs, strict=True):
                        writer.append(buffer, part)
            context.progress(part.numel * task.recipe.cost(1, len(targets)))
        with phases("writing"):
            finish(region_readers, chain.from_iterable(writers))

    def _check(self, task: Task, j: int, read: dict[str, Buffer]) -> None:
        layout = self._context.readers[j].layout
        for key, buffer in read.items() if not self._context.allow_nonfinite else ():
            check_finite(task, layout, key, buffer.elements)
        if len(read) == 2:
            main, model = (buffer.elements for buffer in read.values())
            if task.recipe.main.differ(main, model):
                raise wrong_main(task, layout, main)


def _buffers(recipe: Recipe, memory: Memory, numel: int) -> tuple[dict[str, Buffer], list[Buffer]]:
    """What is read, by key, and what is written: the same where it is only copied."""
    made = [output.dtype for output in recipe.outputs if output.key not in recipe.inputs]
    inputs, others = memory.buffers([recipe.input_dtypes, made], numel)
    read = dict(zip(recipe.inputs, inputs, strict=True))
    written = iter(others)
    return read, [
        read[output.key] if output.key in read else next(written) for output in recipe.outputs
    ]
