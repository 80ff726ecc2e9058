"""Publication: a checkpoint appears whole under its final name, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from wsm_megatron.checkpoint.layout import COMMON_FILE, MARKER_FILE, METADATA_FILE
from wsm_megatron.checkpoint.run import checkpoint_path, sync_directory, write_tracker
from wsm_megatron.errors import MergeError

PROVENANCE_FILE = "wsm_merge.json"
_OWN_FILES = {METADATA_FILE, MARKER_FILE, COMMON_FILE, PROVENANCE_FILE}


class Staging:
    """A hidden directory beside the target, renamed to it when everything is in. For rank 0."""

    def __init__(self, root: Path, iteration: int):
        self.root, self.iteration = root, iteration
        self.target = checkpoint_path(root, iteration)
        self.path = root / f".{self.target.name}.wsm-{os.getpid()}-{secrets.token_hex(4)}"

    def create(self, nbytes: int) -> Path:
        """Make the directory.

        Raises:
            ValueError: the target exists.
            MergeError: no permission, or less than ``nbytes`` free.
        """
        if os.path.lexists(self.target):
            raise ValueError(
                f"{self.target} exists and is left alone; give another --save or "
                "--output-iteration, or remove it"
            )
        try:
            self.path.mkdir(parents=True)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise MergeError(f"{self.path}: cannot create: {error.strerror}") from error
        if free < nbytes:
            self.discard()
            raise MergeError(
                f"{self.root}: {nbytes / 1e9:.3f} GB needed and {free / 1e9:.3f} GB free; nothing "
                "was written"
            )
        return self.path

    def commit(self) -> Path:
        """Give the finished directory its final name, then move the tracker. Durable."""
        try:
            sync_directory(self.path)
            if os.path.lexists(self.target):
                raise MergeError(f"{self.target} appeared during the merge; it is left alone")
            os.rename(self.path, self.target)
            sync_directory(self.root)
            write_tracker(self.root, self.iteration)
        except OSError as error:
            raise MergeError(f"{self.target}: cannot publish: {error.strerror}") from error
        return self.target

    def discard(self) -> None:
        """Remove what a failed merge has written."""
        shutil.rmtree(self.path, ignore_errors=True)


def copy_side_files(source: Path, directory: Path) -> None:
    """Copy what a checkpoint holds beside its entries, such as ``tokenizer/``, durably."""
    for child in sorted(source.iterdir()):
        if child.name in _OWN_FILES or child.suffix == ".distcp":
            continue
        try:
            if child.is_dir():
                shutil.copytree(child, directory / child.name, copy_function=_copy)
            else:
                _copy(child, directory / child.name)
        except (OSError, shutil.Error) as error:
            raise MergeError(f"{child}: cannot copy to {directory}: {error}") from error


def _copy(source: str | Path, target: str | Path) -> None:
    with open(source, "rb") as reading, open(target, "xb") as writing:
        shutil.copyfileobj(reading, writing)
        writing.flush()
        os.fsync(writing.fileno())
