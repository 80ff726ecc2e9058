"""Copying chunks of the newest sources: each is read once, and written for every merge it ends."""

from __future__ import annotations

import threading

from wsm_megatron.engine.context import Context, Target, finish
from wsm_megatron.engine.damage import check_finite
from wsm_megatron.engine.recipe import Task
from wsm_megatron.engine.tile import Memory


class Copier:
    """Does tasks whose rule is ``COPY``. Safe to share between threads."""

    def __init__(self, context: Context, stop: threading.Event):
        self._context, self._stop = context, stop
        self._targets: dict[int, list[Target]] = {}
        for merge, target in zip(context.merges, context.targets, strict=True):
            self._targets.setdefault(merge.newest, []).append(target)

    def copy(self, task: Task, j: int, memory: Memory, elements: int) -> None:
        """Copy a task's chunk of source ``j``, at most ``elements`` at a time."""
        context, recipe, phases = self._context, task.recipe, self._context.phases
        with phases("reading"):
            (cover,) = context.covers(task, j)
        writers = [writer for target in self._targets[j] for writer in target.chunks(task)]
        for part in task.box.split(elements):
            if self._stop.is_set():
                return
            ((buffer,),) = memory.buffers([recipe.input_dtypes], part.numel)
            with phases("reading"):
                cover.read(part, buffer)
            if not context.allow_nonfinite:
                with phases("reducing"):
                    check_finite(task, context.readers[j].layout, buffer.elements)
            with phases("writing"):
                for writer in writers:
                    writer.append(buffer)
            context.progress(part.numel * recipe.cost(1, len(writers)))
        with phases("writing"):
            finish([cover], writers)
