"""The source checkpoints of a merge: opened, and placed on the axis of the decay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.common_state import CommonSummary, load_common, summarize
from wsm_megatron.checkpoint.layout import (
    COMMON_FILE,
    MARKER_FILE,
    METADATA_FILE,
    Layout,
    read_layout,
)
from wsm_megatron.checkpoint.reader import CheckpointReader, read_file
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.checkpoint.side_files import SideFiles, find_side_files
from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.schedule.decay import check_weights, coefficients, effective_lr
from wsm_megatron.schedule.window import Checkpoint, positions, why_iterations
from wsm_megatron.storage.retry import patiently, watched

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Name, size, modification and change time (ns) of a checkpoint's files. The change time also tells
a file that was written anew and given its old modification time. It moves with modes and links too:
it says whether an earlier merge was of these files, not whether they were rewritten meanwhile."""


@dataclass(frozen=True)
class Source:
    """One checkpoint to merge.

    Attributes:
        metadata_crc: CRC-32 of its ``.metadata``.
        save_id: what tells one save from another; None where the writer gave it none.
        fingerprint: of its files when it was opened.
        beside: what lies beside its tensors.
    """

    path: Path
    iteration: int
    layout: Layout
    metadata_crc: int
    save_id: str | None
    fingerprint: Fingerprint
    beside: SideFiles = field(default_factory=SideFiles)

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
    """Positions of the sources and what the decay makes of them, oldest first.

    Attributes:
        why_iterations: why the unit is iterations, not tokens.
        lr: learning rates of the sources, where any is known.
    """

    positions: tuple[int, ...]
    unit: str
    coefficients: tuple[float, ...]
    why_iterations: str | None = None
    lr: tuple[float | None, ...] = ()

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


def open_source(root: Path, iteration: int, whole: bool = True) -> Source:
    """Open one selected checkpoint: its layout, and what tells later that it changed.

    Args:
        whole: all of its files must be there.
    """
    path = checkpoint_path(root, iteration)
    before = fingerprint(path)
    layout = read_layout(path, whole)
    metadata = read_file(path / METADATA_FILE)
    beside = find_side_files(path, layout.files)
    return Source(path, iteration, layout, crc32(metadata), save_id(metadata), before, beside)


def save_id(metadata: bytes) -> str | None:
    """The id that ``torch.distributed.checkpoint`` gives every save (``StorageMeta.save_id``).

    Looked for in the bytes of ``.metadata``: there the attribute's name is followed, a few opcodes
    later, by its value, and reading all of the pickle for it would take seconds.
    """
    found = _SAVE_ID.search(metadata, max(0, metadata.rfind(b"save_id")))
    return found[1].decode() if found else None


_SAVE_ID = re.compile(rb"save_id.{0,12}?([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.DOTALL)


def check_saves(sources: Sequence[Source]) -> None:
    """Raise ``UsageError`` for two sources that are one save under two names."""
    known: dict[str, Source] = {}
    for source in sources:
        if source.save_id is None:
            continue
        if other := known.get(source.save_id):
            raise UsageError(
                f"{other.path} and {source.path} are copies of one save (id {source.save_id}): "
                "the merge would count it twice; leave one of them out (--iterations)"
            )
        known[source.save_id] = source


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
        weighed = check_weights(weights, len(where), allow_unnormalized)
    else:
        weighed = coefficients(where, decay, min_decay)
    lr = tuple(c.lr for c in checkpoints)
    known = any(one is not None for one in lr)
    return Decay(where, unit, weighed, why_iterations(checkpoints), lr if known else ())


def read_summary(path: Path) -> CommonSummary:
    """Where in training a checkpoint was taken, from its common state."""
    summary = summarize(load_common(*read_common(path)))
    finished = patiently((path / MARKER_FILE).stat, lambda: f"{path}: looking").st_mtime
    return replace(summary, finished=finished)


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
