"""What is in a checkpoint or a run. Reads metadata and the common state only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wsm_megatron.checkpoint.common import load_common, summarize
from wsm_megatron.checkpoint.layout import ObjectEntry, TensorEntry, is_complete, read_layout
from wsm_megatron.checkpoint.roles import Role
from wsm_megatron.checkpoint.run import checkpoint_path, read_tracker, scan_run
from wsm_megatron.engine.provenance import read_provenance
from wsm_megatron.engine.sources import read_common, read_tokens


@dataclass(frozen=True)
class CheckpointContents:
    """Entries of a checkpoint by role, its iteration and tokens (None where unknown)."""

    path: Path
    iteration: int | None
    tokens: int | None
    by_role: dict[Role, tuple[TensorEntry | ObjectEntry, ...]]
    provenance: dict | None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entries in self.by_role.values() for entry in entries)


@dataclass(frozen=True)
class RunContents:
    """Checkpoints of a run, oldest first: iteration, tokens, merged or not."""

    path: Path
    checkpoints: tuple[tuple[int, int | None, bool], ...]
    unfinished: tuple[int, ...]
    tracker: str | None


def inspect_checkpoint(path: Path) -> CheckpointContents:
    """List one checkpoint's entries.

    Raises:
        ValueError: not a finished torch_dist checkpoint. MergeError: a damaged one.
    """
    layout = read_layout(path)
    summary = summarize(load_common(*read_common(path, layout)))
    by_role: dict[Role, list[TensorEntry | ObjectEntry]] = {}
    for entry in layout.entries.values():
        by_role.setdefault(entry.role, []).append(entry)
    ordered = {role: tuple(by_role[role]) for role in Role if role in by_role}
    return CheckpointContents(
        path, summary.iteration, summary.tokens, ordered, read_provenance(path)
    )


def inspect_run(path: Path) -> RunContents:
    """List a run's checkpoints."""
    run = scan_run(path)
    checkpoints = []
    for iteration in run.finished:
        checkpoint = checkpoint_path(path, iteration)
        merged = read_provenance(checkpoint) is not None
        checkpoints.append((iteration, read_tokens(checkpoint), merged))
    return RunContents(path, tuple(checkpoints), run.unfinished, read_tracker(path))


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is itself a checkpoint, rather than a run of them."""
    return is_complete(path) or (path / ".metadata").is_file() or path.name.startswith("iter_")
