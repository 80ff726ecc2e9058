"""A merged checkpoint, saved by the framework while the merged weights are in place."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.layout import METADATA_FILE, is_complete
from wsm_megatron.checkpoint.reader import size_and_crc
from wsm_megatron.checkpoint.run_directory import (
    checkpoint_path,
    list_checkpoints,
    read_tracker,
    write_tracker,
)
from wsm_megatron.checkpoint.staging_dir import publish
from wsm_megatron.config import MergeConfig
from wsm_megatron.planning.provenance import describe, write_provenance
from wsm_megatron.plugin.collectives import (
    all_gather,
    broadcast,
    is_first_rank,
    rank_and_size,
    together,
)
from wsm_megatron.plugin.readback import check_written
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint
from wsm_megatron.storage.durable import fsync_path

logger = logging.getLogger(__name__)

_SHOWN = 40  # characters of a tracker that says something else
_STAGING = ".wsm-emit"  # the framework's root while a merged checkpoint is not whole


def emit(
    save_below: Callable[[Path, dict[str, Any]], None],
    run: Path | None,
    root: Path,
    merge: MergeCoefficients,
    config: MergeConfig,
    resume: dict[str, Any],
    precision: Mapping[str, Any],
    averaged: Callable[[int], dict[str, Any]],
) -> Path:
    """Save the model as it is now to ``root/iter_XXXXXXX``, whole or not at all. Collective.

    The framework saves below a hidden root, of which the finished checkpoint is moved out;
    ``root``'s own tracker moves last.

    Args:
        save_below: saves below a root, for the newest iteration of ``merge``, with a provenance.
        run: the root of the run's own checkpoints.
        config: the offline merge that this one equals, for the provenance.
        resume: how to launch from it.
        precision: how main params and weights are kept, in the names of Megatron's arguments.
        averaged: what a source is the average of, by its iteration; empty for a snapshot.

    Raises:
        Whatever the save raises, on the ranks where it does; ``OSError`` and ``MergeError`` where
        the checkpoint cannot be published.
    """
    iteration = merge.iterations[-1]
    staging = root / f".iter_{iteration:07d}{_STAGING}"
    with together(f"making {root}"):
        if is_first_rank():
            root.mkdir(parents=True, exist_ok=True)
    sources = [_source(c, run, averaged(c.iteration)) for c in merge.checkpoints]
    provenance = describe(sources, merge, config, iteration) | {"resume": resume}
    written, target = checkpoint_path(staging, iteration), checkpoint_path(root, iteration)
    try:
        with together(f"saving below {staging}"):
            save_below(staging, provenance)
        check_written(written, precision)
        files = checksums(written)
        with together(f"publishing {target}"):
            if is_first_rank():
                _remove_empty_folders(written)
                write_provenance(written, provenance, files)
                _publish(written, target)
    except BaseException:
        if is_first_rank():
            shutil.rmtree(staging, ignore_errors=True)  # the run needs the space
        raise
    return target


def _source(one: Checkpoint, run: Path | None, averaged: dict[str, Any]) -> dict[str, Any]:
    """What it is the average of; or a snapshot, and the run's own checkpoint of that iteration
    where there is one."""
    source: dict[str, Any] = {"iteration": one.iteration, "tokens": one.tokens, **averaged}
    if run is not None and not averaged:
        path = checkpoint_path(run, one.iteration)
        if (path / METADATA_FILE).is_file():
            source["path"] = str(path.resolve())
    return source


def checksums(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file, the files shared out among the ranks. Collective."""
    names = broadcast(lambda: _files(directory), f"listing {directory}")
    rank, size = rank_and_size()
    mine: dict[str, tuple[int, int]] = {}
    with together(f"reading {directory} back"):
        mine = {name: size_and_crc(directory / name) for name in names[rank::size]}
    return {name: found for part in all_gather(mine) for name, found in part.items()}


def _remove_empty_folders(directory: Path) -> None:
    """Megatron-Bridge leaves one for the files of a tokenizer that has none; no file of a merge
    accounts for it."""
    for folder, _, _ in os.walk(directory, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)


def _files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def recover(root: Path, iteration: int) -> None:
    """After a start at ``iteration``: remove what a killed run left unfinished, and let the tracker
    catch up, which lags where the run died between publishing a merged checkpoint and moving it.

    What the plugin did not write is left alone, with a warning. Collective.
    """
    with together(f"cleaning up {root}"):
        if is_first_rank():
            _recover(root)
            _warn_of_newer(root, iteration)


def _recover(root: Path) -> None:
    if not root.is_dir():
        return
    for leftover in root.glob(f".iter_*{_STAGING}"):
        shutil.rmtree(leftover)
    found = list_checkpoints(root)
    finished = sorted(i for i, path in found.items() if is_complete(path))
    if unfinished := sorted(set(found) - set(finished)):
        logger.warning(
            "wsm: %s: iterations %s are unfinished (no metadata.json), and no merge of this run "
            "left them so: they are not touched, and no merged checkpoint can take their place; "
            "remove them",
            *(root, unfinished),
        )
    _let_tracker_catch_up(root, finished)


def _warn_of_newer(root: Path, iteration: int) -> None:
    if root.is_dir() and (newer := sorted(i for i in list_checkpoints(root) if i > iteration)):
        logger.warning(
            "wsm: %s holds merged checkpoints of iterations %s, and this run starts at iteration "
            "%d: they stay as they are and are not merged anew. If they are another run's, move "
            "them away or give another --wsm-merge-save",
            *(root, newer, iteration),
        )


def _let_tracker_catch_up(root: Path, finished: list[int]) -> None:
    tracked = read_tracker(root)
    if tracked == "release":
        logger.warning(
            "wsm: the tracker of %s says release: --load takes that until the next merged "
            "checkpoint of this run is published there",
            root,
        )
    elif tracked is None or not _names_one_of(tracked, finished):
        if tracked is not None:
            logger.warning(
                "wsm: the tracker of %s says %r, which is no merged checkpoint there%s",
                *(root, tracked[:_SHOWN], f"; it now says {finished[-1]}" if finished else ""),
            )
        if finished:
            write_tracker(root, finished[-1])
    elif int(tracked) < finished[-1]:
        write_tracker(root, finished[-1])


def _names_one_of(tracked: str, iterations: list[int]) -> bool:
    return len(tracked) < _SHOWN and tracked.isdecimal() and int(tracked) in iterations


def _publish(written: Path, target: Path) -> None:
    publish(written, target)
    fsync_path(target.parent)
    write_tracker(target.parent, int(target.name.removeprefix("iter_")))
    shutil.rmtree(written.parent)
