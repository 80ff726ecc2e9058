"""Whether the files of a directory have changed since they were last looked at."""

from __future__ import annotations

from pathlib import Path

from wsm_megatron.errors import MergeError
from wsm_megatron.storage.retry import watched, with_retries

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Name, size, modification and change time (ns) of a directory's files. The change time also tells
a file that was written anew and given its old modification time. It moves with modes and links too:
it says whether an earlier merge was of these files, not whether they were rewritten meanwhile."""


def fingerprint(path: Path) -> Fingerprint:
    """Of every file directly in a directory."""
    try:
        with watched(lambda: f"{path}: listing"):
            entries = [(child.name, child.stat()) for child in path.iterdir() if child.is_file()]
    except OSError as error:
        raise MergeError(f"{path}: cannot list: {error.strerror}") from error
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in entries))


def check_unchanged(path: Path, before: Fingerprint) -> None:
    """Raise ``MergeError`` when a directory was rewritten or deleted since."""
    if not with_retries(path.is_dir, lambda: f"{path}: looking"):
        raise MergeError(
            f"{path} was deleted while it was read (does the run keep its newest checkpoints "
            "only?); nothing was published"
        )
    if _contents(fingerprint(path)) != _contents(before):
        raise MergeError(
            f"{path} changed while it was read (a run saving over it, or old checkpoints being "
            "deleted?); nothing was published"
        )


def _contents(files: Fingerprint) -> list[tuple[str, int, int]]:
    return [(name, size, modified) for name, size, modified, _ in files]
