"""A merged checkpoint, saved by Megatron itself while the merged weights are in place."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
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
from wsm_megatron.planning.launch_flags import describe_resume
from wsm_megatron.planning.provenance import describe, write_provenance
from wsm_megatron.plugin.collectives import (
    all_gather,
    broadcast,
    is_first_rank,
    rank_and_size,
    together,
)
from wsm_megatron.plugin.patched_attrs import patched_attrs
from wsm_megatron.plugin.readback import check_written
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.storage.durable import fsync_path

logger = logging.getLogger(__name__)

_SHOWN = 40  # characters of a tracker that says something else
_STAGING = ".wsm-emit"  # Megatron's root while a merged checkpoint is not whole


def emit(
    save: Callable[[], None],
    checkpointing: Any,
    args: Any,
    root: Path,
    merge: MergeCoefficients,
    config: MergeConfig,
) -> Path:
    """Save the model as it is now to ``root/iter_XXXXXXX``, whole or not at all. Collective.

    Megatron saves below a hidden root, of which the finished checkpoint is moved out; ``root``'s
    own tracker moves last.

    Args:
        save: calls Megatron's ``save_checkpoint`` for the newest iteration of ``merge``.
        checkpointing: the module ``megatron.training.checkpointing``.
        args: Megatron's arguments; some are replaced while it saves.
        config: the offline merge that this one equals, for the provenance.

    Raises:
        Whatever Megatron's save raises, on the ranks where it does; ``OSError`` and ``MergeError``
        where the checkpoint cannot be published.
    """
    iteration = merge.iterations[-1]
    staging = root / f".iter_{iteration:07d}{_STAGING}"
    with together(f"making {root}"):
        if is_first_rank():
            root.mkdir(parents=True, exist_ok=True)
    run = Path(args.save) if args.save else None
    sources = [_source(c.iteration, c.tokens, run) for c in merge.checkpoints]
    provenance = describe(sources, merge, config, iteration)
    provenance["resume"] = _resume(iteration, config, args)
    written, target = checkpoint_path(staging, iteration), checkpoint_path(root, iteration)
    drop = config.optimizer_state == "drop"
    try:
        _save_below(staging, save, checkpointing, args, provenance, drop)
        check_written(written)
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


def _save_below(
    staging: Path,
    save: Callable[[], None],
    checkpointing: Any,
    args: Any,
    provenance: dict[str, Any],
    drop: bool,
) -> None:
    """Let Megatron save to ``staging``, at once and without its optimizer where ``drop``."""
    generate = _generator(checkpointing.generate_state_dict, provenance, args)
    with (
        together(f"saving below {staging}"),
        patched_attrs(checkpointing, generate_state_dict=generate),
        patched_attrs(checkpointing.wandb_utils, on_save_checkpoint_success=lambda *_, **__: None),
        patched_attrs(
            args,
            save=str(staging),
            async_save=False,
            save_retain_interval=None,
            no_save_optim=args.no_save_optim or drop,
        ),
    ):
        save()


def _resume(iteration: int, config: MergeConfig, args: Any) -> dict[str, Any]:
    """How to launch from the merge; the LR scheduler's clock is the consumed samples."""
    steps = {"num_steps": getattr(args, "consumed_train_samples", 0)}
    state = {"args": args, "iteration": iteration, "opt_param_scheduler": steps}
    if args.no_save_optim:
        config = replace(config, optimizer_state="drop")
    return describe_resume(state, config)


def _source(iteration: int, tokens: int | None, run: Path | None) -> dict[str, Any]:
    """A snapshot, and the run's own checkpoint of that iteration where there is one."""
    source: dict[str, Any] = {"iteration": iteration, "tokens": tokens}
    if run is not None:
        path = checkpoint_path(run, iteration)
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


def _files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def _remove_empty_folders(directory: Path) -> None:
    """Main leaves ``tokenizer`` where a tokenizer has no files; a list of files cannot name it."""
    for folder in sorted(directory.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _generator(original: Callable[..., dict[str, Any]], provenance: Any, args: Any) -> Any:
    """``generate_state_dict`` that adds the provenance, and the run's own arguments as they are."""
    own = {name: getattr(args, name) for name in ("save", "async_save", "save_retain_interval")}

    def generate_state_dict(*positional: Any, **keywords: Any) -> dict[str, Any]:
        state = original(*positional, **keywords)
        state["args"] = copy.copy(state["args"])
        for name, value in own.items():
            setattr(state["args"], name, value)
        state["wsm_merge"] = provenance
        return state

    return generate_state_dict


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
