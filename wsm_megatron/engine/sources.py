"""The source checkpoints of a merge: selected, opened, placed on the axis of the decay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.common import load_common, summarize
from wsm_megatron.checkpoint.layout import COMMON_FILE, METADATA_FILE, Layout, read_layout
from wsm_megatron.checkpoint.patience import patiently, watched
from wsm_megatron.checkpoint.reader import CheckpointReader, read_file
from wsm_megatron.checkpoint.run import RunDirectory, checkpoint_path, scan_run
from wsm_megatron.decay import check_weights, coefficients, effective_lr
from wsm_megatron.errors import MergeError
from wsm_megatron.window import Checkpoint, Window, positions, select, slide

logger = logging.getLogger(__name__)

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Name, size, modification and change time (ns) of a checkpoint's files. The change time also tells
a file that was written anew and given its old modification time. It moves with modes and links too:
it says whether an earlier merge was of these files, not whether they were rewritten meanwhile."""


@dataclass(frozen=True)
class Source:
    """One checkpoint to merge.

    Attributes:
        tokens: consumed samples x sequence length; None where the checkpoint does not say.
        metadata_crc: CRC-32 of its ``.metadata``, which tells one save from another.
        fingerprint: of its files when it was opened.
    """

    path: Path
    iteration: int
    tokens: int | None
    layout: Layout
    metadata_crc: int
    fingerprint: Fingerprint

    def check_unchanged(self) -> None:
        """Raise ``MergeError`` when the checkpoint was rewritten or deleted since it was opened."""
        if not patiently(self.path.is_dir, lambda: f"{self.path}: looking"):
            raise MergeError(
                f"{self.path} was deleted while it was read (does the run keep its newest "
                "checkpoints only?); nothing was published"
            )
        if _contents(fingerprint(self.path)) != _contents(self.fingerprint):
            raise MergeError(
                f"{self.path} changed while it was read (a run saving over it, or old checkpoints "
                "being deleted?); nothing was published"
            )


@dataclass(frozen=True)
class Decay:
    """Positions of the sources and what the decay makes of them, oldest first."""

    positions: tuple[int, ...]
    unit: str
    coefficients: tuple[float, ...]

    @property
    def effective_lr(self) -> tuple[float, ...]:
        """The n - 1 multipliers w_i of the intervals between the sources."""
        return effective_lr(self.coefficients)


def fingerprint(path: Path) -> Fingerprint:
    """Of every file directly in a checkpoint."""
    try:
        with watched(lambda: f"{path}: listing"):
            entries = [(child.name, child.stat()) for child in path.iterdir() if child.is_file()]
    except OSError as error:
        raise MergeError(f"{path}: cannot list: {error.strerror}") from error
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in entries))


def _contents(files: Fingerprint) -> list[tuple[str, int, int]]:
    return [(name, size, modified) for name, size, modified, _ in files]


def select_checkpoints(
    root: Path, window: Window, sliding_every: int | None = None
) -> tuple[tuple[Checkpoint, ...], ...]:
    """Selections of a run's checkpoints, with their tokens, oldest first: one, or all that slide.

    Warns about unfinished ones; raises ``ValueError`` where one is named explicitly.
    """
    run = scan_run(root)
    return choose_checkpoints(
        run, window, sliding_every, cache(lambda i: read_tokens(run.checkpoint(i)))
    )


def choose_checkpoints(
    run: RunDirectory,
    window: Window,
    sliding_every: int | None,
    tokens: Callable[[int], int | None],
) -> tuple[tuple[Checkpoint, ...], ...]:
    """:func:`select_checkpoints` of a run whose contents are known."""
    _report_unfinished(run, window)

    def with_tokens(iteration: int) -> Checkpoint:
        return Checkpoint(iteration, tokens(iteration))

    needs_all = window.window_tokens is not None
    available = [with_tokens(i) if needs_all else Checkpoint(i) for i in run.finished]
    if sliding_every is None:
        selections: tuple[tuple[Checkpoint, ...], ...] = (select(available, window),)
    else:
        selections = slide(available, window, sliding_every)
    return tuple(tuple(with_tokens(c.iteration) for c in chosen) for chosen in selections)


def open_source(root: Path, checkpoint: Checkpoint, whole: bool = True) -> Source:
    """Open one selected checkpoint: its layout, and what tells later that it changed.

    Args:
        whole: all of its files must be there.
    """
    path = checkpoint_path(root, checkpoint.iteration)
    before = fingerprint(path)
    layout = read_layout(path, whole)
    metadata_crc = crc32(read_file(path / METADATA_FILE))
    return Source(path, checkpoint.iteration, checkpoint.tokens, layout, metadata_crc, before)


def decay_over(
    checkpoints: tuple[Checkpoint, ...],
    decay: str,
    min_decay: float,
    weights: tuple[float, ...] | None,
    allow_unnormalized: bool,
) -> Decay:
    """Coefficients of a decay, or of explicit weights, over checkpoints, oldest first."""
    where, unit = positions(checkpoints)
    if weights is not None:
        return Decay(where, unit, check_weights(weights, len(where), allow_unnormalized))
    return Decay(where, unit, coefficients(where, decay, min_decay))


def read_tokens(path: Path) -> int | None:
    """Tokens that a checkpoint has seen, from its common state."""
    return tokens_of(read_common(path))


def tokens_of(common: tuple[bytes, str]) -> int | None:
    """The same from a common state that was read."""
    return summarize(load_common(*common)).tokens


def read_common(path: Path, layout: Layout | None = None) -> tuple[bytes, str]:
    """A checkpoint's common state as stored, and its name for messages.

    It is ``common.pt``, or from Megatron 0.19 an entry inside the distcp files.

    Raises:
        MergeError: neither is there.
    """
    if (path / COMMON_FILE).is_file():
        return read_file(path / COMMON_FILE), str(path / COMMON_FILE)
    layout = layout or read_layout(path, whole=False)
    entry = layout.common_entry
    if entry is None:
        raise MergeError(f"{path}: no common state, neither common.pt nor in the distcp files")
    reader = CheckpointReader(layout)
    try:
        return reader.read_object(entry), f"{path}: {entry.key}"
    finally:
        reader.close()


def _report_unfinished(run: RunDirectory, window: Window) -> None:
    named = {*(window.iterations or ()), window.from_, window.to}
    for iteration in run.unfinished:
        if iteration in named:
            raise ValueError(
                f"{run.checkpoint(iteration)} is unfinished (no metadata.json, which Megatron "
                "writes last); leave it out"
            )
        logger.warning("%s is unfinished and left out", run.checkpoint(iteration))
