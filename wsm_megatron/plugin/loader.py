"""After a restart: the run's ordinary checkpoints, loaded by Megatron itself, for the window."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from wsm_megatron.checkpoint.layout import PROVENANCE_FILE, is_complete
from wsm_megatron.checkpoint.run_directory import list_checkpoints
from wsm_megatron.errors import MergeError
from wsm_megatron.plugin.collectives import all_gather, broadcast, is_first_rank
from wsm_megatron.plugin.patched_attrs import patched_attrs
from wsm_megatron.plugin.shards import unlike_weights
from wsm_megatron.schedule.window import Consumed

logger = logging.getLogger(__name__)

_NAMED = 3  # params in a message


class Loader:
    """Megatron's ``load_checkpoint``, first watched at the start of the run, then called again.

    Args:
        checkpointing: ``megatron.training.checkpointing``.
        args: Megatron's arguments.
        interval: iterations between snapshots; None where they come with the saves.
    """

    def __init__(self, checkpointing: ModuleType, args: Any, interval: int | None) -> None:
        self._checkpointing, self._args, self._interval = checkpointing, args, interval
        self._keywords: dict[str, Any] = {}
        self._saved_with: Any = args

    @contextmanager
    def watched(self, training: ModuleType) -> Iterator[None]:
        """Within it, note how Megatron loads what the run starts from."""

        def load_checkpoint(*positional: Any, **keywords: Any) -> Any:
            self._keywords = keywords
            return self._load(*positional, **keywords)

        with patched_attrs(training, load_checkpoint=load_checkpoint):
            yield

    def attach(self, model: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any) -> None:
        """Take model, optimizer and scheduler as they were built, and loaded."""
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._start = self._consumed(self._args.iteration)
        self._start_counts = self._has_snapshot(self._start.iteration)
        unlike = self._unlike() if self._start.iteration else ""
        if unlike and is_first_rank():
            logger.warning(
                "wsm: iteration %d, which this run was started from: the main params of %s are "
                "not those of its weights, and the first step overwrites the weights by them, "
                "with this plugin or without",
                *(self._args.iteration, unlike),
            )

    @property
    def start(self) -> Consumed:
        """Where the run was started from."""
        return self._start

    def available(self) -> list[int]:
        """Iterations that the window may be refilled from: of finished checkpoints below
        ``--load`` that are no merges, and the one that was loaded; the same on every rank.
        Collective."""
        root, start = self._args.load, self._start.iteration
        found = set(broadcast(lambda: _finished(root), f"listing {root}"))
        if self._interval is not None:
            found = {i for i in (*found, start) if i % self._interval == 0}
        elif not self._start_counts:
            found.discard(start)
        return sorted(found)

    def load(self, iteration: int) -> Consumed | None:
        """Load an ordinary checkpoint; for the iteration that the run was started from, exactly
        what Megatron loaded then, a non-persistent checkpoint perhaps. Collective.

        The scheduler stays out of it: loading it twice would add its steps up.

        Returns:
            How far the run had come there; None for a checkpoint of which the run had no snapshot,
            and, after a warning, for one that is not what its folder says, or not fit for a merge.

        Raises:
            MergeError: the run cannot return to where it was started from.
        """
        if iteration == self._start.iteration:
            self._come_back()
            return self._start
        exactly: dict[str, Any] = {"ckpt_step": iteration}
        if hasattr(self._args, "non_persistent_ckpt_type"):  # Megatron would prefer its newest
            exactly["non_persistent_ckpt_type"] = None
        loaded, consumed = self._load_again(exactly)
        if not self._has_snapshot(iteration):
            return None
        if loaded != iteration:
            reason = f"its state says iteration {loaded}"
        elif unlike := self._unlike():
            reason = f"the main params of {unlike} are not those of its weights"
        else:
            return consumed
        if is_first_rank():
            logger.warning(
                "wsm: window without iteration %d: in %s, %s", iteration, self._args.load, reason
            )
        return None

    def _come_back(self) -> None:
        loaded, _ = self._load_again({})
        if loaded != self._start.iteration:
            raise MergeError(
                f"the run was started from iteration {self._start.iteration}, and now Megatron "
                f"loads iteration {loaded} in its place: is another job writing below "
                f"{self._args.load}? Start this one again when that has ended"
            )
        self._scheduler.step(increment=0)  # the LR of the parameter groups came from the checkpoint

    def _load_again(self, changes: dict[str, Any]) -> tuple[int, Consumed]:
        """The iteration that was loaded; Megatron's arguments are left as they were."""
        args = self._args
        names = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
        with patched_attrs(args, **{name: getattr(args, name) for name in names}, **changes):
            loaded = self._load(self._model, self._optimizer, None, **self._keywords)[0]
            return loaded, self._consumed(loaded)

    def _load(self, *positional: Any, **keywords: Any) -> Any:
        """Call Megatron's own function, and note with what arguments the checkpoint was saved."""
        check, self._saved_with = self._checkpointing.check_checkpoint_args, None

        def check_checkpoint_args(saved: Any, *more: Any, **options: Any) -> Any:
            self._saved_with = saved
            return check(saved, *more, **options)

        with patched_attrs(self._checkpointing, check_checkpoint_args=check_checkpoint_args):
            return self._checkpointing.load_checkpoint(*positional, **keywords)

    def _consumed(self, iteration: int) -> Consumed:
        """How far the run had come in what was loaded last."""
        if self._saved_with is None:
            return Consumed(iteration, None, None)
        return Consumed(
            iteration,
            self._args.consumed_train_samples,
            getattr(self._saved_with, "seq_length", None),
            getattr(self._saved_with, "iteration", None),
        )

    def _has_snapshot(self, iteration: int) -> bool:
        """Of what was loaded last: whether it was saved in its turn, and not at an exit."""
        every = self._interval or getattr(self._saved_with, "save_interval", None)
        return not every or iteration % every == 0

    def _unlike(self) -> str:
        """Some of the params whose main params are of other weights on any rank. Collective."""
        names = set().union(*all_gather(unlike_weights(self._model, self._optimizer)))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(sorted(names)[:_NAMED]) + more


def _finished(root: str | None) -> list[int]:
    if not root or not Path(root).is_dir():
        return []
    found = list_checkpoints(Path(root))
    return sorted(
        i
        for i, path in found.items()
        if i > 0 and is_complete(path) and not (path / PROVENANCE_FILE).is_file()
    )
