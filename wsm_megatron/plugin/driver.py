"""What the plugin does at each event of the training loop."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.layout import is_complete
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import is_internal, is_told
from wsm_megatron.plugin import arguments, dry_run
from wsm_megatron.plugin.average_restart import take_up_average
from wsm_megatron.plugin.collectives import all_gather, is_first_rank, on_all_ranks, on_any_rank
from wsm_megatron.plugin.combination import Combination
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.emit import emit, recover
from wsm_megatron.plugin.evaluate import preserved_rng, record, replay
from wsm_megatron.plugin.load_balance import ExpertLoads
from wsm_megatron.plugin.padding import checked_slices
from wsm_megatron.plugin.room import reserve_room
from wsm_megatron.plugin.trainer import Progress, Trainer
from wsm_megatron.plugin.wsm import WSM
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Consumed

logger = logging.getLogger(__name__)


class Driver:
    """One run with ``--wsm-merge``: between the framework's loop and :class:`WSM`.

    Snapshots come with saves (or every ``--wsm-merge-interval``); merges with evaluations,
    ``--wsm-merge-save-interval``, SIGUSR2 and the end of training. Every method is collective. A
    merge that fails is left out on every rank with a warning, and training goes on.

    Raises ``UsageError`` for flags that cannot work in this run.
    """

    def __init__(self, trainer: Trainer, config: WSMConfig) -> None:
        args = trainer.args
        arguments.check_run(args, config)
        self._trainer, self._args, self._config = trainer, args, config
        self._roots = arguments.merged_roots(args, config)
        self._folder = arguments.shards_dir(args, config)
        self._every = arguments.keep_interval(args, config)
        self._requested = self._finished = self._save_is_checked = False
        self._saving: int | None = None
        self._emitted: dict[Combination, int] = {}

    def attach(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        """Model and optimizer are built and loaded: take up the window.

        Raises ``UsageError`` where memory or disk are too small, or the optimizer is unsupported;
        ``SystemExit(0)``, on every rank, at the end of a dry run.
        """
        args = self._args
        self._model, self._optimizer = model, optimizer
        if self._config.dry_run:
            self._rehearse()
        self._wsm = WSM(model, optimizer, self._config, self._folder)
        tokens = args.global_batch_size * args.seq_length
        number = self._config.reach.size(self._every, tokens)
        assert number is not None, "the interval between snapshots is known here"
        reserve_room(self._wsm, number, self._folder)
        signal.signal(signal.SIGUSR2, self._request)
        for root in self._roots.values():
            recover(root, args.iteration)
        self._loads = ExpertLoads(model) if self._config.eval else None
        self._trainer.checkpoints.attach(model, optimizer, scheduler)
        self._take_up()
        _say("window begins with iterations %s", [c.iteration for c in self._wsm.kept])

    def _rehearse(self) -> None:
        """Say what the window would cost, and end: nothing is kept or written."""
        config = replace(self._config, store="memory", dir=None)
        wsm = WSM(self._model, self._optimizer, config)
        device = next(p.device for chunk in self._model for p in chunk.parameters())
        assert self._every is not None, "check_run refuses runs without snapshots"
        try:
            dry_run.report(wsm, self._config, self._args, self._every, self._folder, device)
        finally:
            wsm.close()
        _say("the dry run ends here, before training")
        on_all_ranks(True)  # nobody leaves while another still waits for what it has to say
        raise SystemExit(0)

    def _take_up(self) -> None:
        args, checkpoints = self._args, self._trainer.checkpoints
        if self._config.moving is not None:
            self._take_up_average()
            return
        if not args.iteration or args.finetune or args.no_load_optim:
            self._wsm.refill(args.iteration, checkpoints.start)
            return
        available = checkpoints.available()
        with preserved_rng():
            self._wsm.refill(args.iteration, checkpoints.start, available, checkpoints.load)

    def _take_up_average(self) -> None:
        args = self._args
        if args.iteration and args.no_load_optim and is_first_rank():
            logger.warning(
                "wsm: the moving average begins anew at iteration %d: --no-load-optim loads no "
                "main params",
                args.iteration,
            )
        if not args.finetune and not args.no_load_optim:
            root = next(iter(self._roots.values()), None)
            with preserved_rng():
                take_up_average(self._wsm, root, self._trainer.checkpoints)
        if args.iteration and self.is_due(args.iteration):
            self._snapshot(args.iteration)

    def close(self) -> None:
        """Finish writes under way and let go of the optimizer."""
        self._wsm.close()

    def evaluated(
        self, iteration: int, data: Any, evaluate: Callable[[str, Any, bool], Any]
    ) -> Any:
        """Let the framework evaluate, then the merged weights on the same batches.

        ``evaluate(tag, data, complete)`` calls its own function: ``tag`` goes before its
        prefix, and without ``complete`` the user's non-loss functions are not called.
        """
        if not self._config.eval:
            return evaluate("", data, True)
        recorded = record(data)
        with self._balance_written(iteration, ""):
            result = evaluate("", recorded, True)
        if self.is_due(iteration):
            self._snapshot(iteration)
        for same in self._distinct():
            self._evaluate_merge(
                iteration, same, lambda tag: evaluate(tag, replay(recorded), False)
            )
        return result

    def _evaluate_merge(
        self, iteration: int, same: list[Combination], evaluate: Callable[[str], Any]
    ) -> None:
        """One merge, under the names of all combinations that it is the merge of."""
        several = len(self._wsm.combinations) > 1
        curves = [f"wsm {one.name}" if several else "wsm" for one in same]
        tag = f"wsm {' = '.join(one.name for one in same)} " if several else "wsm "
        with (
            self._merged("evaluation", same[0]) as merge,
            self._trainer.evaluating_merge(curves),
        ):
            if merge is not None:
                with self._balance_written(iteration, tag):
                    evaluate(tag)

    def _distinct(self) -> list[list[Combination]]:
        """The combinations that there is a merge of, those beside each other whose merge is one and
        the same: before a window is full, it is that of a shorter one. Collective."""
        found: dict[Any, list[Combination]] = {}
        for one in self._wsm.combinations:
            merge = self._wsm.coefficients(one)
            if merge is not None:
                found.setdefault((merge.iterations, merge.coefficients), []).append(one)
        if not found:
            _say("no evaluation yet: %d snapshots kept", len(self._wsm.kept))
        return list(found.values())

    @contextmanager
    def _balance_written(self, iteration: int, tag: str) -> Iterator[None]:
        """Around an evaluation: how evenly a mixture of experts spread its tokens. Collective."""
        assert self._loads is not None, "there are evaluations of merges"
        with self._loads.counting():
            yield
        if (balance := self._loads.balance()) is None:
            return
        scalars = {
            "max violation validation": balance.max_violation,
            "min violation validation": balance.min_violation,
        }
        self._trainer.write_scalars(scalars, iteration)
        _say(
            "load of experts at %siteration %d: max violation %.6f (worst layer %.6f), min "
            "violation %.6f",
            *(tag, iteration, balance.max_violation, balance.worst, balance.min_violation),
        )

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
        self.saved(progress)

    def saved(self, progress: Progress) -> None:
        """After a persistent save in its turn, the weights being as it saved them."""
        if self._config.snapshot_every is None and self.is_due(progress.iteration):
            self._snapshot(progress.iteration)
        if self._finished:
            self._emit_last(progress)

    def confirm(self, iteration: int) -> None:
        """The asynchronous save of an iteration is durable."""
        self._wsm.confirm(iteration)

    def scheduled(self, request: Any) -> None:
        """Megatron schedules an asynchronous save: the snapshot counts once that is durable."""
        if self._saving is not None:
            iteration = self._saving
            request.add_finalize_fn(lambda: self.confirm(iteration))

    def stepped(self, progress: Progress) -> None:
        """After every iteration, its evaluation and its saves."""
        if self._config.snapshot_every is not None and self.is_due(progress.iteration):
            self._snapshot(progress.iteration)
        self._wsm.add_step(progress.iteration)
        if progress.iteration in self._wsm and self._wants_merge(progress.iteration):
            with self._trainer.untimed():
                self._emit(progress)

    def finished(self, progress: Progress) -> None:
        """Training is over, but for a last save that the framework may still make."""
        self._finished = True
        if not self._trainer.saves_after_training(progress.iteration):
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

    def is_due(self, iteration: int) -> bool:
        """Whether a snapshot is to be taken at an iteration."""
        assert self._every is not None, "check_run refuses runs without snapshots"
        return iteration % self._every == 0 and iteration >= self._config.start_iter

    def _wants_merge(self, iteration: int) -> bool:
        """Whether a merged checkpoint is due at an iteration of which there is a snapshot."""
        every = self._config.save_interval
        if not self._roots or (every is not None and iteration % every == 0):
            return bool(self._roots)
        return on_any_rank(self._requested)

    def _request(self, *_: Any) -> None:
        self._requested = True

    def _snapshot(self, iteration: int) -> None:
        if iteration in self._wsm:
            return
        awaited = self._args.async_save and self._config.snapshot_every is None
        args = self._args
        here = Consumed(iteration, args.consumed_train_samples, args.seq_length, args.iteration)
        stall = self._wsm.snapshot(iteration, here, durable=not awaited)
        size = self._wsm.nbytes
        if self._config.moving is not None:
            return  # of a step
        _say("snapshot of iteration %d, %d bytes a rank, stall %.4f s", iteration, size, stall)

    @contextmanager
    def _merged(self, purpose: str, combination: Combination) -> Iterator[MergeCoefficients | None]:
        """Merged weights in place, or None where they cannot be. Collective."""
        with ExitStack() as stack:
            merge = None
            if self._wsm.coefficients(combination) is None:
                _say("no %s yet: %d snapshots kept", purpose, len(self._wsm.kept))
            else:
                stack.enter_context(preserved_rng())
                try:
                    merge = stack.enter_context(self._wsm.merged(combination))
                except Exception as error:  # on every rank, and weights are restored
                    _warn(f"no {purpose}, the merge failed", error)
            yield merge

    def _emit_last(self, progress: Progress) -> None:
        if not self._is_emitted(progress.iteration) and progress.iteration >= max(
            self._config.start_iter, 1
        ):
            self._snapshot(progress.iteration)
            self._emit(progress)

    def _is_emitted(self, iteration: int) -> bool:
        """Whether all merged checkpoints of an iteration are there."""
        ends = [self._emitted.get(one) for one in self._roots]
        return bool(ends) and all(end == iteration for end in ends)

    def _emit(self, progress: Progress) -> None:
        """Save the merged checkpoints that end in the newest snapshot."""
        if not self._roots:
            return
        self._trainer.finish_saves()
        for combination, root in self._roots.items():
            if self._emitted.get(combination) != progress.iteration:
                self._emit_one(progress, combination, root)

    def _emit_one(self, progress: Progress, combination: Combination, root: Path) -> None:
        if on_any_rank(checkpoint_path(root, progress.iteration).exists()):
            self._requested = False
            self._say_taken(checkpoint_path(root, progress.iteration))
            return
        began = time.perf_counter()
        try:
            with self._merged("merged checkpoint", combination) as merge:
                if merge is None:
                    return  # a request stays open until there is something to merge
                self._requested = False
                if merge.iterations[-1] != progress.iteration:
                    _say("no merged checkpoint: iteration %d is not kept", progress.iteration)
                    return
                target = self._save(progress, merge, root)
        except Exception as error:  # on every rank, and weights are restored
            _warn(f"no merged checkpoint at {progress.iteration}", error)
            return
        self._emitted[combination] = progress.iteration
        self._wsm.emitted()
        seconds = time.perf_counter() - began
        if self._config.moving is not None:
            _say("moving average of %d saved as %s in %.2f s", progress.iteration, target, seconds)
            return
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
        drop = self._config.optimizer_state == "drop"

        def save_below(staging: Path, provenance: dict[str, Any]) -> None:
            with checked_slices(self._optimizer, put_right=True):
                self._trainer.save_below(
                    staging, self._model, self._optimizer, progress, provenance, drop=drop
                )

        run = Path(self._args.save) if self._args.save else None
        is_window = self._config.moving is None
        offline = MergeConfig(
            load=run or root,
            save=root,
            iterations=merge.iterations if is_window else None,
            decay=merge.decay or "linear",  # of a moving average there is none
            min_decay=self._config.min_decay,
            optimizer_state="drop" if self._args.no_save_optim else self._config.optimizer_state,
        )
        resume = self._trainer.resume(progress.iteration, offline)
        precision, averaged = self._trainer.precision, self._wsm.averaged
        return emit(save_below, run, root, merge, offline, resume, precision, averaged)


def _warn(what: str, error: Exception) -> None:
    """Go on after an error of all ranks. A defect has its traceback in the log, here or already."""
    stack = is_internal(error) and not is_told(error)
    logger.warning("wsm: %s: %s", what, error, exc_info=stack)


def _say(message: str, *values: Any) -> None:
    if is_first_rank():
        logger.info("wsm: " + message, *values)
