"""What the plugin does at each event of Megatron-LM's training loop."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from wsm_megatron.checkpoint.layout import is_complete
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import is_internal, is_told
from wsm_megatron.plugin import arguments
from wsm_megatron.plugin.collectives import all_gather, is_first_rank, on_any_rank
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.emit import emit, recover
from wsm_megatron.plugin.evaluate import preserved_rng, record, replay, tagged_writers
from wsm_megatron.plugin.loader import Loader
from wsm_megatron.plugin.padding import checked_slices
from wsm_megatron.plugin.patched_attrs import patched_attrs
from wsm_megatron.plugin.room import reserve_room
from wsm_megatron.plugin.snapshots import window_size
from wsm_megatron.plugin.wsm import WSM
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Consumed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """What the driver calls of ``megatron.training``."""

    training: ModuleType
    checkpointing: ModuleType
    save_checkpoint: Callable[..., Any]
    """Megatron's own, not the plugin's wrapper around it."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training is, and what Megatron's ``save_checkpoint`` wants to know about it."""

    iteration: int
    flops: Any
    scheduler: Any
    data_iterator: Any


class Driver:
    """One run with ``--wsm-merge``: between Megatron's loop and :class:`WSM`.

    Snapshots come with saves (or every ``--wsm-merge-interval``); merges with evaluations,
    ``--wsm-merge-save-interval``, SIGUSR2 and the end of training. Every method is collective. A
    merge that fails is left out on every rank with a warning, and training goes on.

    Raises ``UsageError`` for flags that cannot work in this run.
    """

    def __init__(self, megatron: Megatron, args: Any, config: WSMConfig) -> None:
        arguments.check_run(args, config)
        self._megatron, self._args, self._config = megatron, args, config
        self._root = arguments.merged_root(args, config)
        self._folder = arguments.shards_dir(args, config)
        self._every = arguments.keep_interval(args, config)
        self._loader = Loader(megatron.checkpointing, args, config.interval)
        self._requested = self._finished = self._save_is_checked = False
        self._saving: int | None = None
        self._emitted = -1

    def loading(self) -> AbstractContextManager[None]:
        """Around the set-up of model and optimizer: watch how Megatron loads a checkpoint."""
        return self._loader.watched(self._megatron.training)

    def attach(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        """Model and optimizer are built and loaded: take up the window.

        Raises ``UsageError`` where memory or disk are too small, or the optimizer is unsupported.
        """
        args = self._args
        self._model, self._optimizer = model, optimizer
        self._wsm = WSM(model, optimizer, self._config, self._folder)
        number = window_size(self._config, self._every, args.global_batch_size * args.seq_length)
        assert number is not None, "the interval between snapshots is known here"
        reserve_room(self._wsm, number, self._folder)
        signal.signal(signal.SIGUSR2, self._request)
        if self._root is not None:
            recover(self._root, args.iteration)
        self._loader.attach(model, optimizer, scheduler)
        self._take_up()
        _say("window begins with iterations %s", [c.iteration for c in self._wsm.kept])

    def _take_up(self) -> None:
        args, start = self._args, self._loader.start
        if not args.iteration or args.finetune or args.no_load_optim:
            self._wsm.refill(args.iteration, start)
            return
        available = self._loader.available()
        with preserved_rng():
            self._wsm.refill(args.iteration, start, available, self._loader.load)

    def close(self) -> None:
        """Finish writes under way and let go of the optimizer."""
        self._wsm.close()

    def evaluated(
        self, iteration: int, data: Any, evaluate: Callable[[str, Any, bool], Any]
    ) -> Any:
        """Let Megatron evaluate, then the merged weights on the same batches.

        ``evaluate(tag, data, complete)`` calls Megatron's own function: ``tag`` goes before its
        prefix, and without ``complete`` the user's non-loss functions are not called.
        """
        if not self._config.eval:
            return evaluate("", data, True)
        recorded = record(data)
        result = evaluate("", recorded, True)
        if self._due(iteration):
            self._snapshot(iteration)
        valid_samples = self._args.consumed_valid_samples
        with (
            self._merged("evaluation") as merge,
            tagged_writers(self._megatron.training),
            patched_attrs(self._args, consumed_valid_samples=valid_samples),
        ):
            if merge is not None:
                evaluate("wsm ", replay(recorded), False)
        return result

    @contextmanager
    def saving(self, progress: Progress) -> Iterator[None]:
        """Around a persistent save of Megatron's: take a snapshot of what is saved in its turn. One
        of a save at the end of a job would push another out after the restart."""
        self._saving = progress.iteration
        try:
            if self._save_is_checked:
                yield
            else:
                with checked_slices(self._optimizer, put_right=False) as wrong:
                    yield
                self._save_is_checked = True
                self._warn_of_wrong_saves(wrong)
        finally:
            self._saving = None
        if self._config.interval is None and self._due(progress.iteration):
            self._snapshot(progress.iteration)
        if self._finished:
            self._emit_last(progress)

    def scheduled(self, request: Any) -> None:
        """Megatron schedules an asynchronous save: the snapshot counts once that is durable."""
        if self._saving is not None:
            iteration = self._saving
            request.add_finalize_fn(lambda: self._wsm.confirm(iteration))

    def stepped(self, progress: Progress) -> None:
        """After every iteration, its evaluation and its saves."""
        if self._config.interval is not None and self._due(progress.iteration):
            self._snapshot(progress.iteration)
        if progress.iteration in self._wsm and self._wants_merge(progress.iteration):
            timers = self._megatron.training.get_timers()
            timers("interval-time").stop()
            self._emit(progress)
            timers("interval-time", log_level=0).start(barrier=True)

    def finished(self, progress: Progress) -> None:
        """Training is over, but for a last save that Megatron may still make."""
        self._finished = True
        args = self._args
        last_save = args.save and args.save_interval and progress.iteration % args.save_interval
        if not last_save:
            self._emit_last(progress)

    def _warn_of_wrong_saves(self, wrong: list[str]) -> None:
        names = sorted(set().union(*all_gather(wrong)))
        if names and is_first_rank():
            logger.warning(
                "wsm: this Megatron-LM saves %d tensors of the optimizer wrongly (several DDP "
                "buckets with padding, --dist-ckpt-optim-fully-reshardable), %s among them. Merged "
                "checkpoints of this run are saved right. Its own are not: a restart resumes from "
                "wrong main params and moments. Save without that option, or in one bucket "
                "(--ddp-bucket-size larger than the model)",
                *(len(names), names[0]),
            )

    def _due(self, iteration: int) -> bool:
        assert self._every is not None, "check_run refuses runs without snapshots"
        return iteration % self._every == 0 and iteration >= self._config.start_iter

    def _wants_merge(self, iteration: int) -> bool:
        """Whether a merged checkpoint is due at an iteration of which there is a snapshot."""
        every = self._config.save_interval
        if self._root is None or (every is not None and iteration % every == 0):
            return self._root is not None
        return on_any_rank(self._requested)

    def _request(self, *_: Any) -> None:
        self._requested = True

    def _snapshot(self, iteration: int) -> None:
        if iteration in self._wsm:
            return
        awaited = self._args.async_save and self._config.interval is None
        args = self._args
        here = Consumed(iteration, args.consumed_train_samples, args.seq_length, args.iteration)
        stall = self._wsm.snapshot(iteration, here, durable=not awaited)
        size = self._wsm.nbytes
        _say("snapshot of iteration %d, %d bytes a rank, stall %.4f s", iteration, size, stall)

    @contextmanager
    def _merged(self, purpose: str) -> Iterator[MergeCoefficients | None]:
        """The merged weights in place, or None where they cannot be. Collective."""
        with ExitStack() as stack:
            merge = None
            if self._wsm.coefficients() is None:
                _say("no %s yet: %d snapshots kept", purpose, len(self._wsm.kept))
            else:
                stack.enter_context(preserved_rng())
                try:
                    merge = stack.enter_context(self._wsm.merged())
                except Exception as error:  # on every rank, and weights are restored
                    _warn(f"no {purpose}, the merge failed", error)
            yield merge

    def _emit_last(self, progress: Progress) -> None:
        if self._emitted != progress.iteration >= max(self._config.start_iter, 1):
            self._snapshot(progress.iteration)
            self._emit(progress)

    def _emit(self, progress: Progress) -> None:
        """Save a merged checkpoint that ends in the newest snapshot."""
        if self._root is None:
            return
        self._megatron.training.maybe_finalize_async_save(blocking=True)
        if on_any_rank(checkpoint_path(self._root, progress.iteration).exists()):
            self._requested = False
            self._say_taken(checkpoint_path(self._root, progress.iteration))
            return
        began = time.perf_counter()
        try:
            with self._merged("merged checkpoint") as merge:
                if merge is None:
                    return  # a request stays open until there is something to merge
                self._requested = False
                if merge.iterations[-1] != progress.iteration:
                    _say("no merged checkpoint: iteration %d is not kept", progress.iteration)
                    return
                target = self._save(progress, merge, self._root)
        except Exception as error:  # on every rank, and weights are restored
            _warn(f"no merged checkpoint at {progress.iteration}", error)
            return
        self._emitted = progress.iteration
        seconds = time.perf_counter() - began
        _say("merged %s into %s in %.2f s", list(merge.iterations), target, seconds)
        _say(
            "coefficients %s by %s, effective LR %s%s",
            *(merge.coefficients, merge.unit, merge.effective_lr),
            f"; not by tokens, as {merge.why_iterations}" if merge.why_iterations else "",
        )

    def _say_taken(self, target: Path) -> None:
        """Why there is no merged checkpoint: its place is taken."""
        if target == checkpoint_path(target.parent, self._args.iteration) and is_complete(target):
            _say("%s is there already", target)  # the run was started from its end again
        elif is_first_rank():
            logger.warning(
                "wsm: no merged checkpoint: %s was there before this run got there%s, and stays as "
                "it is; move it away, or give another --wsm-merge-save",
                *(target, "" if is_complete(target) else " (unfinished)"),
            )

    def _save(self, progress: Progress, merge: MergeCoefficients, root: Path) -> Path:
        def save() -> None:
            with checked_slices(self._optimizer, put_right=True):
                self._megatron.save_checkpoint(
                    progress.iteration,
                    self._model,
                    self._optimizer,
                    progress.scheduler,
                    progress.flops,
                    {},  # the cached save strategy belongs to the run
                    train_data_iterator=progress.data_iterator,
                    preprocess_common_state_dict_fn=(
                        self._megatron.training.preprocess_common_state_dict
                    ),
                )

        offline = MergeConfig(
            load=Path(self._args.save or root),
            save=root,
            iterations=merge.iterations,
            decay=self._config.decay,
            min_decay=self._config.min_decay,
            optimizer_state=self._config.optimizer_state,
        )
        return emit(save, self._megatron.checkpointing, self._args, root, merge, offline)


def _warn(what: str, error: Exception) -> None:
    """Go on after an error of all ranks. A defect has its traceback in the log, here or already."""
    stack = is_internal(error) and not is_told(error)
    logger.warning("wsm: %s: %s", what, error, exc_info=stack)


def _say(message: str, *values: Any) -> None:
    if is_first_rank():
        logger.info("wsm: " + message, *values)
