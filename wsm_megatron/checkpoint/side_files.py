"""What lies beside a checkpoint's tensors: which of it goes with a merge, and how it is copied.

Metadata does: tokenizers, run configs, small text. Weights and training state do not, as they would
be those of the newest source under a merge's name. Links are never followed out of the checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from isal.isal_zlib import crc32

from wsm_megatron.checkpoint import bridge
from wsm_megatron.checkpoint.layout import (
    COMMON_FILE,
    MARKER_FILE,
    METADATA_FILE,
    PROVENANCE_FILE,
)
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.errors import MergeError
from wsm_megatron.storage.durable import fsync_path
from wsm_megatron.storage.retry import watched, with_retries

logger = logging.getLogger(__name__)

Files = dict[str, tuple[int, int]]
"""Size and CRC-32 of files, by path within the checkpoint."""

MOST_BYTES = 64 * 2**20
"""Of text and config files that have no name known here; a large vocabulary fits."""
_DEEPEST = 16
"""Folders inside each other that are looked into."""
_NAMED = 20
"""Names in a warning."""
_PIECE = 4 * 2**20

_OWN = {METADATA_FILE, MARKER_FILE, COMMON_FILE, PROVENANCE_FILE}
_WEIGHTS = {".safetensors", ".bin", ".gguf", ".onnx", ".ckpt", ".h5", ".msgpack", ".nemo"}
_STATE = {".pt", ".pth", ".distcp", ".npy", ".npz", ".pkl", ".pickle"}
_TEXT = {
    *(".json", ".jsonl", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".txt", ".md", ".csv"),
    *(".model", ".tiktoken", ".vocab", ".bpe", ".jinja", ".py"),
}
_TEXT_NAMES = {"LICENSE", "NOTICE", "README"}
_INDEX = re.compile(r".*\.index\.json")
_STATE_NAME = re.compile(
    r"latest.*|(.*[-_.])?state([-_.].*)?|.*(train(er|ing)?|rng|optim(izer)?|scheduler)state.*",
    re.IGNORECASE,
)
_STATE_FOLDER = re.compile(r".*optim.*|mp_rank_.*|global_step.*|.*dataloader.*", re.IGNORECASE)
_TOKENIZER = re.compile(r"(.*_)?tokenizer(_.*)?", re.IGNORECASE)
_MODELOPT = "modelopt_state"
"""A folder of ModelOpt's: how the model was quantised or pruned, the same in all checkpoints."""


@dataclass(frozen=True)
class SideFile:
    """A file to copy.

    Attributes:
        name: where it goes, relative to the checkpoint.
        content: where it comes from: the same, but for a link.
    """

    name: str
    content: str
    nbytes: int


@dataclass(frozen=True)
class SideFiles:
    """What of a checkpoint's side files is copied, and what is not: names, each with the reason."""

    copied: tuple[SideFile, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.copied)


def find_side_files(checkpoint: Path, shards: Collection[str]) -> SideFiles:
    """Look at what a checkpoint holds beside its entries. Opens no file but Bridge's train state.

    Args:
        shards: the ``.distcp`` files that ``.metadata`` names.

    Raises:
        MergeError: a folder cannot be listed.
    """
    copied: list[SideFile] = []
    left_out: list[str] = []
    search = _Search(checkpoint, shards)
    folders = [PurePosixPath()]
    while folders:
        for name, verdict in search.look(folders.pop()):
            if isinstance(verdict, SideFile):
                copied.append(verdict)
            elif verdict is None:
                folders.append(name)
            else:
                left_out.append(f"{name} ({verdict})")
    copied.sort(key=lambda file: file.name)
    return SideFiles(tuple(copied), tuple(sorted(left_out)))


Verdict = SideFile | str | None
"""To copy; why it is left out; None for a folder to look into."""


class _Search:
    def __init__(self, checkpoint: Path, shards: Collection[str]):
        self._path, self._own = checkpoint, _OWN | set(shards)
        self._real = os.path.realpath(checkpoint)

    def look(self, folder: PurePosixPath) -> Iterator[tuple[PurePosixPath, Verdict]]:
        """Every child of a folder, but the checkpoint's own files, and what to do with it."""
        path = self._path / folder
        try:
            with watched(lambda: f"{path}: listing"), os.scandir(path) as entries:
                children = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        except PermissionError:
            yield folder, "not readable"
            return
        except OSError as error:
            raise MergeError(f"{path}: cannot list: {error.strerror}") from error
        if folder.parts and not _is_known(folder) and any(map(_is_weights, dict(children))):
            yield folder, "an export with weights of its own"
            return
        for child, status in children:
            name = folder / child
            if str(name) not in self._own:
                yield name, self._judge(name, status)

    def _judge(self, name: PurePosixPath, status: os.stat_result) -> Verdict:
        mode = status.st_mode
        if stat.S_ISLNK(mode):
            return self._judge_link(name)
        if stat.S_ISDIR(mode):
            if len(name.parts) > _DEEPEST:
                return f"more than {_DEEPEST} folders deep"
            state = _STATE_NAME.fullmatch(name.name) or _STATE_FOLDER.fullmatch(name.name)
            return "training state" if state and not _is_known(name) else None
        if not stat.S_ISREG(mode):
            return "not a regular file"
        return self._judge_file(name, name, status.st_size)

    def _judge_link(self, name: PurePosixPath) -> Verdict:
        """A link to a file of this checkpoint is that file."""
        try:
            real = os.path.realpath(self._path / name, strict=True)
            status = os.stat(real)
        except OSError:
            return "a link that leads nowhere"
        if os.path.commonpath([real, self._real]) != self._real:
            return "a link out of the checkpoint"
        content = PurePosixPath(os.path.relpath(real, self._real))
        if not stat.S_ISREG(status.st_mode):
            return "a link to a folder or device"
        if str(content) in self._own:
            return "a link to the checkpoint's own files"
        verdict = self._judge_file(content, content, status.st_size)
        if isinstance(verdict, str):
            return verdict
        return self._judge_file(name, content, status.st_size)

    def _judge_file(self, name: PurePosixPath, content: PurePosixPath, nbytes: int) -> Verdict:
        file = SideFile(str(name), str(content), nbytes)
        if name.parts[0] == _MODELOPT or self._is_train_state(file):
            return file
        if _is_weights(name.name) or name.suffix.lower() in _STATE:
            return "weights or training state"
        if _STATE_NAME.fullmatch(name.name):
            return "training state"
        if not os.access(self._path / content, os.R_OK):
            return "not readable"
        if _is_known(name.parent):
            return file
        if name.suffix.lower() not in _TEXT and name.name not in _TEXT_NAMES:
            return "of a kind not known here"
        return file if nbytes <= MOST_BYTES else f"larger than {MOST_BYTES // 2**20} MiB"

    def _is_train_state(self, file: SideFile) -> bool:
        if file.name != bridge.TRAIN_STATE_FILE or file.nbytes > bridge.MOST_BYTES:
            return False
        try:
            bridge.with_step(_read(self._path / file.content, file.nbytes), 0, file.name)
        except MergeError:
            return False
        return True


def _is_weights(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _WEIGHTS or _INDEX.fullmatch(name) is not None


def _is_known(folder: PurePosixPath) -> bool:
    """A folder, or one inside it, whose files are metadata whatever they are called."""
    return bool(folder.parts) and (
        folder.parts[0] == _MODELOPT or any(map(_TOKENIZER.fullmatch, folder.parts))
    )


def warn_of_left_out(found: Collection[tuple[Path, SideFiles]]) -> None:
    """One warning for what is not copied from checkpoints."""
    names = [f"{path / name}" for path, files in found for name in files.left_out]
    if not names:
        return
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    logger.warning(
        "not copied beside the merged tensors: %s%s; copy by hand what belongs to a merge",
        ", ".join(names[:_NAMED]),
        more,
    )


def copy_side_files(
    checkpoint: Path, found: SideFiles, directory: Path, iteration: int, keeps_optimizer: bool
) -> Files:
    """Copy side files, durably, those of Megatron-Bridge brought up to date.

    Args:
        checkpoint: where they are; ``found`` in it.
        iteration: of the merged checkpoint.
        keeps_optimizer: whether it holds optimizer and RNG states.

    Returns:
        the copies.

    Raises:
        MergeError: one was changed since it was found, or cannot be copied.
    """
    files: Files = {}
    for file in found.copied:
        source, target = checkpoint / file.content, directory / file.name
        _make_folder(target.parent, directory)
        if file.name == bridge.TRAIN_STATE_FILE:
            state = bridge.with_step(_read(source, file.nbytes), iteration, str(source))
            files[file.name] = write_file(target, state)
        elif _is_run_config(file) and not keeps_optimizer:
            config = bridge.without_optimizer(_read(source, file.nbytes))
            files[file.name] = write_file(target, config)
        else:
            files[file.name] = _copy(source, target, file.nbytes)
    for folder in sorted({(directory / name).parent for name in files} - {directory}):
        fsync_path(folder)
    return files


def _is_run_config(file: SideFile) -> bool:
    return file.name == bridge.RUN_CONFIG_FILE and file.nbytes <= bridge.MOST_BYTES


def _make_folder(folder: Path, root: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MergeError(f"{folder}: cannot create: {error.strerror}") from error


def _read(path: Path, nbytes: int) -> bytes:
    return with_retries(lambda: b"".join(_pieces(path, nbytes)), lambda: f"{path}: reading")


def _copy(source: Path, target: Path, nbytes: int) -> tuple[int, int]:
    crc = 0
    pieces = _pieces(source, nbytes)
    try:
        with watched(lambda: f"{source}: copying to {target}"), target.open("xb") as stream:
            for piece in pieces:
                crc = crc32(piece, crc)
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise MergeError(f"{source}: cannot copy to {target}: {error.strerror}") from error
    return nbytes, crc


def _pieces(path: Path, nbytes: int) -> Iterator[bytes]:
    """A regular file's bytes, ``nbytes`` of them; neither a link nor a FIFO is opened."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as stream:
        status = os.fstat(stream.fileno())
        done = 0
        if stat.S_ISREG(status.st_mode) and status.st_size == nbytes:
            while piece := stream.read(min(_PIECE, nbytes - done)):
                yield piece
                done += len(piece)
    if done != nbytes:
        raise MergeError(f"{path} changed while its checkpoint was merged; nothing was published")
