"""The ``--wsm-merge-*`` flags, and whether they fit the run they are given to."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.errors import UsageError
from wsm_megatron.options import (
    PATH,
    SWITCH,
    Options,
    add_flags,
    given_flags,
    local_path,
    option,
    read_yaml,
)
from wsm_megatron.plugin.combination import ITERS, NUM, TOKENS, Combination
from wsm_megatron.plugin.config import WSMConfig

logger = logging.getLogger(__name__)

_MERGED_OFFLINE = {"use_megatron_fsdp": "Megatron FSDP", "use_torch_fsdp2": "torch FSDP2"}


@dataclass(frozen=True, kw_only=True)
class _Switch(Options):
    """What is no option of a merge: whether there is one, and the file of its options."""

    wsm_merge: bool = option(
        "take snapshots of the main params and merge them; without it the other flags are refused",
        SWITCH,
        False,
    )
    wsm_merge_config: Path | None = option(
        "YAML file of the options below (num: 8, decay: 1-sqrt); flags win over it",
        PATH,
        None,
        metavar="FILE",
    )


OPTIONS = (*_Switch.options(), *WSMConfig.options())
"""All ``--wsm-merge*`` flags, the switch first."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one flag for each field of :class:`WSMConfig`, beside ``--wsm-merge`` itself.

    Flags that are not given leave no trace in the namespace: the YAML file may set them.
    """
    add_flags(parser.add_argument_group("wsm", "merging of checkpoints in training (WSM)"), OPTIONS)
    return parser


def config_from_args(args: argparse.Namespace) -> WSMConfig | None:
    """The config of a run, or None where ``--wsm-merge`` is not given.

    Raises ``UsageError`` for flags that contradict each other or would have no effect.
    """
    given = given_flags(args, OPTIONS)
    switch = _Switch(**given.of(_Switch))
    if not switch.wsm_merge:
        if flags := [one.flag for one in OPTIONS[1:] if one.name in given.values]:
            raise UsageError(f"{', '.join(flags)} without effect: --wsm-merge is not given")
        return None
    if switch.wsm_merge_config is not None:
        options = WSMConfig.options()
        given = read_yaml(switch.wsm_merge_config, options, "--wsm-merge-config") | given
    given.tell_renamed()
    return WSMConfig(**given.of(WSMConfig))


def merged_root(args: Any, config: WSMConfig) -> Path | None:
    """The folder of merged checkpoints, or None where the run saves nowhere."""
    if config.save is not None:
        return config.save
    return local_path(args.save, "without --wsm-merge-save, --save") / "wsm" if args.save else None


def merged_roots(args: Any, config: WSMConfig) -> dict[Combination, Path]:
    """The root of merged checkpoints of each merge that is emitted: the folder of all of them, or
    where several are, a folder in it for each. Empty where the run saves nowhere."""
    root = merged_root(args, config)
    if root is None:
        return {}
    several = len(config.emitted) > 1
    return {one: root / one.name if several else root for one in config.emitted}


def shards_dir(args: Any, config: WSMConfig) -> Path | None:
    """The folder of the disk store, or None for the memory store.

    Raises ``UsageError`` where the disk store has no folder to be in.
    """
    if config.store != "disk":
        return None
    if config.dir is None and not args.save:
        raise UsageError("--wsm-merge-store disk: give --wsm-merge-dir, the run has no --save")
    if config.dir is not None:
        return config.dir
    return local_path(args.save, "without --wsm-merge-dir, --save") / "wsm_shards"


def keep_interval(args: Any, config: WSMConfig) -> int | None:
    """Iterations between snapshots; None where none is taken by interval."""
    if config.snapshot_every is not None:
        return config.snapshot_every
    return args.save_interval if args.save else None


def check_run(args: Any, config: WSMConfig) -> None:
    """Refuse what cannot work in this run, warn about what may surprise.

    Raises ``UsageError``. Called before the model is built.
    """
    _check_supported(args)
    _check_schedule(args, config)
    _check_intervals(args, config)
    _check_results(args, config)
    _check_folders(args, config)
    _check_retention(args, config)


def _check_supported(args: Any) -> None:
    for name, what in _MERGED_OFFLINE.items():
        if getattr(args, name, False):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"--wsm-merge does not merge inside a run with {what} ({flag}): train without "
                "--wsm-merge, and merge the checkpoints that it saves: wsm merge --load "
                f"{getattr(args, 'save', None) or 'SAVE'} --save MERGED"
            )
    if args.ckpt_format != "torch_dist":
        raise UsageError(f"--wsm-merge needs --ckpt-format torch_dist, not {args.ckpt_format}")


def _check_schedule(args: Any, config: WSMConfig) -> None:
    style = args.lr_decay_style
    if style == "constant" or config.allow_lr_decay or (style == "WSD" and _stays_stable(args)):
        return
    raise UsageError(
        f"--wsm-merge replaces LR decay, but --lr-decay-style {style} decays the LR in this run: "
        "use --lr-decay-style constant, or --wsm-merge-allow-lr-decay to have both"
    )


def _stays_stable(args: Any) -> bool:
    """Whether a WSD schedule is still in its stable phase when the run ends."""
    if getattr(args, "train_samples", None):
        end, decay, last = args.lr_decay_samples, args.lr_wsd_decay_samples, args.train_samples
    else:
        end, decay, last = args.lr_decay_iters, args.lr_wsd_decay_iters, args.train_iters
    return end is not None and decay is not None and end - decay >= last


def _check_intervals(args: Any, config: WSMConfig) -> None:
    every = keep_interval(args, config)
    if every is None:
        raise UsageError(
            "--wsm-merge would take no snapshot: give --save and --save-interval, or "
            "--wsm-merge-interval"
        )
    what = "--wsm-merge-interval" if config.interval else "--save-interval"
    if config.moving is not None:
        what = "--wsm-merge-average-every"
    config.check_blocks(every, what)
    if config.save_interval is not None and config.save_interval % every:
        raise UsageError(
            f"--wsm-merge-save-interval {config.save_interval} is not a multiple of {what} "
            f"{every}: a merged checkpoint ends in a snapshot"
        )
    for one in config.reaches:
        if one.unit == ITERS and one.length < every:
            raise UsageError(
                f"{one.flag} {one.length} holds fewer than two checkpoints: one is kept every "
                f"{every} iterations"
            )
    if args.train_iters is not None and config.start_iter >= args.train_iters:
        raise UsageError(
            f"--wsm-merge-start-iter {config.start_iter} is not before the end of training, "
            f"iteration {args.train_iters}"
        )
    _check_tokens(args, config, every)
    _check_several(args, config, every)


def tokens_per_iteration(args: Any) -> int | None:
    """Once the global batch size is ramped up; None where the run does not say."""
    samples, length = getattr(args, "global_batch_size", None), getattr(args, "seq_length", None)
    return samples * length if samples and length else None


def _check_tokens(args: Any, config: WSMConfig, every: int) -> None:
    tokens = tokens_per_iteration(args)
    for one in config.reaches:
        if one.unit == TOKENS and tokens is not None and one.length < every * tokens:
            raise UsageError(
                f"{one.flag} {one.length} holds fewer than two checkpoints: one is kept every "
                f"{every} iterations, {every * tokens} tokens"
            )


def _check_several(args: Any, config: WSMConfig, every: int) -> None:
    """Of several windows each must fill within the run, or its curve would be another's."""
    if args.train_iters is None or len(config.reaches) < 2:
        return
    taken = args.train_iters // every - (max(config.start_iter, 1) - 1) // every
    taken += bool(args.train_iters % every)  # the last one, at the end of training
    for one in config.reaches:
        if one.unit == NUM and one.length > taken:
            raise UsageError(
                f"{one.flag} {one.length} is never reached: with one every {every} iterations, "
                f"this run takes {taken} snapshots up to iteration {args.train_iters}"
            )


def _check_results(args: Any, config: WSMConfig) -> None:
    root = merged_root(args, config)
    if root is None and (config.save_interval is not None or not config.eval):
        raise UsageError(
            "the merge would go nowhere: give --wsm-merge-save (or --save), or --wsm-merge-eval "
            "without --wsm-merge-save-interval"
        )
    if root is None and config.optimizer_state != "last":
        raise UsageError(
            f"--wsm-merge-optimizer-state {config.optimizer_state} has no effect: no merged "
            "checkpoint is saved, as there is neither --save nor --wsm-merge-save"
        )
    if root is None and config.emit is not None:
        raise UsageError(
            "--wsm-merge-emit has no effect: no merged checkpoint is saved, as there is neither "
            "--save nor --wsm-merge-save"
        )
    if config.moving is not None and root is not None:
        _check_restart(args, config)
    if config.eval and not args.eval_iters:
        logger.warning("--wsm-merge-eval has no effect: --eval-iters is 0")
    if args.no_save_optim and config.optimizer_state != "drop":
        logger.warning(
            "--no-save-optim: merged checkpoints carry no optimizer state either, "
            "--wsm-merge-optimizer-state %s has no effect",
            config.optimizer_state,
        )


def _check_restart(args: Any, config: WSMConfig) -> None:
    """A moving average goes on after a restart from the newest merged checkpoint."""
    why = None
    if config.save_interval is None:
        why = "merged checkpoints come at the end alone: give --wsm-merge-save-interval"
    elif config.optimizer_state == "drop" or args.no_save_optim:
        flag = "--no-save-optim" if args.no_save_optim else "--wsm-merge-optimizer-state drop"
        why = f"merged checkpoints hold no main params ({flag})"
    if why is not None:
        logger.warning("a restart will begin the moving average anew, as %s", why)


def _check_folders(args: Any, config: WSMConfig) -> None:
    """Nothing of the plugin's is written among checkpoints of the run, however the path is put."""
    taken = [(flag, Path(folder).resolve()) for flag, folder in _folders_of_run(args).items()]
    root, shards = merged_root(args, config), shards_dir(args, config)
    roots = {folder for folder in (root, *merged_roots(args, config).values()) if folder}
    merges = "merged checkpoints need a folder and a tracker of their own"
    for flag, folder, what in (
        *(("--wsm-merge-save", folder, merges) for folder in sorted(roots)),
        ("--wsm-merge-dir", shards, "snapshots need a folder of their own"),
    ):
        if folder is None:
            continue
        for other, path in taken:
            if folder.resolve() == path:
                raise UsageError(f"{flag} {folder} is the run's own {other}: {what}; give another")
        taken.append((flag, folder.resolve()))


def _folders_of_run(args: Any) -> dict[str, str]:
    """The folders of checkpoints that Megatron itself reads or writes, by flag."""
    names = ("save", "load", "pretrained_checkpoint", "non_persistent_local_ckpt_dir")
    folders = {"--" + name.replace("_", "-"): getattr(args, name, None) for name in names}
    folders["--non-persistent-global-ckpt-dir"] = getattr(
        args, "non_persistent_global_ckpt_dir", None
    ) or (args.save and str(Path(args.save) / "non_persistent"))
    return {flag: folder for flag, folder in folders.items() if folder}


def _check_retention(args: Any, config: WSMConfig) -> None:
    retain = getattr(args, "save_retain_interval", None)
    if retain is not None and args.save_interval and retain > args.save_interval:
        again = "a restart cannot refill the window from them" if config.store == "memory" else ""
        logger.warning(
            "--save-retain-interval %d deletes checkpoints inside the window that is merged: %s",
            retain,
            "; ".join(filter(None, [again, "an offline merge cannot use them"])),
        )
