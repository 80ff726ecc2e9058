"""Megatron-LM's ``load_checkpoint``, first watched at the start of the run, then called again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from wsm_megatron.plugin.loader import Loaded, Loader
from wsm_megatron.plugin.patched_attrs import patched_attrs
from wsm_megatron.schedule.window import Consumed


class MegatronLoader(Loader):
    """Loads through ``megatron.training.checkpointing``.

    Args:
        checkpointing: that module.
        args: Megatron's arguments; as they were after each load.
        interval: iterations between snapshots; None where they come with the saves.
    """

    def __init__(self, checkpointing: ModuleType, args: Any, interval: int | None) -> None:
        super().__init__(args, interval)
        self._checkpointing = checkpointing
        self._keywords: dict[str, Any] = {}
        self._saved_with: Any = args

    @contextmanager
    def watched(self, training: ModuleType) -> Iterator[None]:
        """Within it, note how Megatron loads what the run starts from."""

        def load_checkpoint(*positional: Any, **keywords: Any) -> Any:
            self._keywords = keywords
            return self._call(*positional, **keywords)

        with patched_attrs(training, load_checkpoint=load_checkpoint):
            yield

    def _started(self) -> Loaded:
        return self._loaded(self._args.iteration)

    def _load(self, iteration: int | None, root: Path | None = None) -> Loaded:
        """Megatron's arguments are left as they were."""
        args, changes = self._args, dict[str, Any]()
        if iteration is not None:
            changes["ckpt_step"] = iteration
            if root is not None:
                changes["load"] = str(root)
            if hasattr(args, "non_persistent_ckpt_type"):  # Megatron would prefer its newest
                changes["non_persistent_ckpt_type"] = None
        names = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
        with patched_attrs(args, **{name: getattr(args, name) for name in names}, **changes):
            found = self._call(self._model, self._optimizer, None, **self._keywords)[0]
            return self._loaded(found)

    def _call(self, *positional: Any, **keywords: Any) -> Any:
        """Call Megatron's own function, and note with what arguments the checkpoint was saved."""
        check, self._saved_with = self._checkpointing.check_checkpoint_args, None

        def check_checkpoint_args(saved: Any, *more: Any, **options: Any) -> Any:
            self._saved_with = saved
            return check(saved, *more, **options)

        with patched_attrs(self._checkpointing, check_checkpoint_args=check_checkpoint_args):
            return self._checkpointing.load_checkpoint(*positional, **keywords)

    def _loaded(self, iteration: int) -> Loaded:
        saved = self._saved_with
        if saved is None:
            return Loaded(Consumed(iteration, None, None), None)
        consumed = Consumed(
            iteration,
            self._args.consumed_train_samples,
            getattr(saved, "seq_length", None),
            getattr(saved, "iteration", None),
        )
        return Loaded(consumed, getattr(saved, "save_interval", None))
