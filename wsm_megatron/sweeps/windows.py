"""Which windows a run affords: what each covers, takes on disk, and takes to merge."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.common_state import read_summary
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.run_directory import RunDirectory, scan_run
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.execution.memory_budget import default_memory
from wsm_megatron.execution.rank import default_threads
from wsm_megatron.planning.job import Job, OutputCheckpoint
from wsm_megatron.planning.tasks import Rule
from wsm_megatron.schedule.window import Checkpoint, Consumed, count_tokens
from wsm_megatron.storage.retry import watched
from wsm_megatron.sweeps.estimate import read_rate

logger = logging.getLogger(__name__)

_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Checkpoints of the windows that are shown, and all there are."""
_MAIN_BYTES = 4
"""Of a main param that is kept during training: float32."""


@dataclass(frozen=True)
class AffordedWindow:
    """The last checkpoints of a run up to one.

    Attributes:
        iterations: from the oldest to the newest. tokens: the same; None where it is not known.
        stored: bytes on disk of all its checkpoints, as large as the sources of the job.
        read: bytes that a merge of it reads. seconds: that takes; None where little is read.
    """

    count: int
    oldest: int
    iterations: int
    tokens: int | None
    stored: int
    read: int
    seconds: float | None


@dataclass(frozen=True)
class Covered:
    """What a window of a job is, beside what was asked for.

    Attributes:
        asked: the option, or ``--last 8`` and the like; empty for all checkpoints.
        span: from the oldest to the newest, in ``unit``. next_span: with one checkpoint more; None
            where there is none.
    """

    asked: str
    count: int
    oldest: int
    newest: int
    span: int
    unit: str
    next_span: int | None


@dataclass(frozen=True)
class Affordable:
    """What a run has, and what this machine has for it.

    Attributes:
        checkpoint_bytes: of a source on disk, the mean. free: bytes where the merge goes.
        kept_bytes: of a checkpoint that ``--wsm-merge`` keeps, over all ranks.
        memory: bytes in flight on a rank that merges.
        read_rate: bytes a second, measured, as the files are now (in the page cache or not).
    """

    covered: tuple[Covered, ...]
    windows: tuple[AffordedWindow, ...]
    checkpoints: int
    checkpoint_bytes: int
    free: int
    kept_bytes: int
    memory: int
    read_rate: float | None

    @property
    def more(self) -> int:
        """How many further checkpoints fit on the disk."""
        return self.free // max(self.checkpoint_bytes, 1)

    def as_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "more_that_fit": self.more}


def affordable(job: Job) -> Affordable:
    """Windows of the job's run that end where its newest merge does.

    Reads a twentieth of what the job would read, 256 MiB at most, for the rate; writes nothing.
    """
    run = job.config.run
    newest = max(job.sources[output.newest].iteration for output in job.outputs)
    known = _counted(run, newest)
    summed, once = _bytes_of_a_source(job)
    threads = job.execution.threads or default_threads()
    rate = read_rate(job, summed * len(job.sources) + once, threads)
    stored = _stored(job)
    return Affordable(
        covered=tuple(_covered(job, output, known) for output in job.outputs),
        windows=tuple(
            _window(known[-count:], stored, summed * count + once, rate)
            for count in sorted({*_COUNTS, len(known)})
            if 2 <= count <= len(known)
        ),
        checkpoints=len(known),
        checkpoint_bytes=stored,
        free=_free(job.config.save),
        kept_bytes=_MAIN_BYTES * _params(job),
        memory=job.execution.memory or default_memory(),
        read_rate=rate,
    )


def _counted(run: Path, newest: int) -> tuple[Checkpoint, ...]:
    """The last checkpoints up to one, with their tokens; as many as a window is shown of."""
    found = scan_run(run)
    chosen = [i for i in found.finished if i <= newest][-max(_COUNTS) :]
    return count_tokens([_consumed(found, i) for i in chosen])


def _consumed(run: RunDirectory, iteration: int) -> Consumed:
    """Of a damaged checkpoint, which the job need not be of, nothing is known."""
    try:
        said = read_summary(run.checkpoint(iteration))
    except (UsageError, MergeError) as error:
        logger.warning("tokens of iteration %d are not known: %s", iteration, error)
        return Consumed(iteration, None, None)
    return Consumed(iteration, said.consumed_samples, said.seq_length, said.began)


def _bytes_of_a_source(job: Job) -> tuple[int, int]:
    """Bytes that a merge reads of every source, and of the newest alone."""
    summed = once = 0
    for task in job.plan.tasks:
        nbytes = task.region.numel * task.recipe.cost(1, 0)
        if task.recipe.rule is Rule.COPY:
            once += nbytes
        else:
            summed += nbytes
    return summed, once


def _stored(job: Job) -> int:
    """Bytes of a source's files, the mean."""
    sizes = [
        sum((source.path / name).stat().st_size for name in source.layout.files)
        for source in job.sources
    ]
    return sum(sizes) // len(sizes)


def _free(save: Path) -> int:
    place = next(path for path in (save.absolute(), *save.absolute().parents) if path.is_dir())
    with watched(lambda: f"{place}: asking for its free space"):
        return shutil.disk_usage(place).free


def _params(job: Job) -> int:
    tensors = job.sources[-1].layout.tensors.values()
    return sum(prod(one.shape) for one in tensors if one.role is Role.MODEL)


def _window(
    chosen: Sequence[Checkpoint], stored: int, read: int, rate: float | None
) -> AffordedWindow:
    first, last = chosen[0], chosen[-1]
    known = first.tokens is not None and last.tokens is not None
    return AffordedWindow(
        count=len(chosen),
        oldest=first.iteration,
        iterations=last.iteration - first.iteration,
        tokens=(last.tokens or 0) - (first.tokens or 0) if known else None,
        stored=stored * len(chosen),
        read=read,
        seconds=None if rate is None else read / rate,
    )


def _covered(job: Job, output: OutputCheckpoint, known: Sequence[Checkpoint]) -> Covered:
    decay, iterations = output.decay, job.iterations(output)
    places = {c.iteration: c.tokens if decay.unit == "tokens" else c.iteration for c in known}
    older = [place for i, place in places.items() if i < iterations[0]]
    end, next_span = places.get(iterations[-1]), None
    if end is not None and older and older[-1] is not None:
        next_span = end - older[-1]
    return Covered(
        asked=_asked(output.provenance["options"]),
        count=len(iterations),
        oldest=iterations[0],
        newest=iterations[-1],
        span=decay.positions[-1] - decay.positions[0],
        unit=decay.unit,
        next_span=next_span,
    )


def _asked(options: dict[str, Any]) -> str:
    """The option that chose a merge's window, as it would be typed."""
    for name in ("window_tokens", "window_iterations", "last", "from_", "iterations"):
        value = options.get(name)
        if value is not None:
            flag = f"--{name.strip('_').replace('_', '-')}"
            values = value if isinstance(value, list) else [value]
            return f"{flag} {','.join(f'{one}' for one in values)}"
    return ""
