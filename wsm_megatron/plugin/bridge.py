"""The plugin as a callback of Megatron-Bridge, whose users never call ``pretrain_gpt.py``. ::

    from megatron.bridge.training.pretrain import pretrain
    from wsm_megatron.plugin.bridge import WSMCallback

    pretrain(config, forward_step, callbacks=[WSMCallback(num=8, decay="1-sqrt", eval=True)])

Bridge's callbacks (``megatron/bridge/training/callbacks.py``, August 2026) tell when a step
begins, when a checkpoint is saved, and when training ends. None is around an evaluation with its
batches, so ``evaluate_and_print_results`` is replaced where ``eval`` is asked for.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from wsm_megatron.checkpoint.layout import is_complete
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.plugin.bridge_trainer import BridgeTrainer
from wsm_megatron.plugin.collectives import broadcast
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.driver import Driver
from wsm_megatron.plugin.trainer import Progress

_EVALUATORS = ("train", "pretrain")
"""The modules of Bridge that call ``evaluate_and_print_results`` by its name."""


class WSMCallback:
    """Snapshots, evaluations of merged weights and merged checkpoints in a run of Bridge.

    Give one to ``pretrain(callbacks=[...])``, on every rank. It is the ``--wsm-merge`` of
    Megatron-LM, option by option; merged checkpoints go to ``<checkpoint.save>/wsm``, which loads
    as any of Bridge's.

    Args:
        config: all options; or
        options: the fields of :class:`.WSMConfig` by name.

    Raises ``UsageError`` for options that contradict each other; when training starts, for a run in
    which they cannot work.
    """

    def __init__(self, config: WSMConfig | None = None, **options: Any) -> None:
        self._config = config if config is not None else WSMConfig(**options)
        self._driver: Driver | None = None
        self._state: Any = None
        self._started = 0
        self._pending: list[int] = []

    def on_train_start(self, context: Any) -> None:
        """Take up the window: model and optimizer are loaded."""
        if self._driver is not None:
            self._driver.close()
        self._state, self._started = context.state, context.state.train_state.step
        every = self._config.snapshot_every
        trainer = BridgeTrainer(_bridge("checkpointing"), context.state, every)
        self._driver = Driver(trainer, self._config)
        self._driver.attach(context.model, context.optimizer, context.scheduler)
        self._pending.clear()
        if self._config.eval:
            self._wrap_evaluations()

    def on_train_step_start(self, context: Any) -> None:
        """Between two steps: the last one is counted, evaluated and saved."""
        if context.state.train_state.step > self._started:
            self._stepped(context)

    def on_checkpoint_save(self, context: Any) -> None:
        """An asynchronous save is told of when it is durable, without its iteration."""
        self._confirm_durable()

    def on_train_end(self, context: Any) -> None:
        """After the last save: the last merged checkpoint."""
        assert self._driver is not None, "training has started"
        self._stepped(context)
        self._driver.finished(_progress(context))

    def _stepped(self, context: Any) -> None:
        assert self._driver is not None, "training has started"
        progress = _progress(context)
        self._driver.saved(progress)
        if context.state.cfg.checkpoint.async_save and self._driver.is_due(progress.iteration):
            self._pending.append(progress.iteration)
            self._confirm_durable()  # it may have been told of before the snapshot was taken
        self._driver.stepped(progress)

    def _confirm_durable(self) -> None:
        assert self._driver is not None, "training has started"
        for iteration in list(self._pending):
            path = checkpoint_path(Path(self._state.cfg.checkpoint.save), iteration)
            if broadcast(partial(is_complete, path), f"looking at {path}"):
                self._driver.confirm(iteration)
                self._pending.remove(iteration)

    def _wrap_evaluations(self) -> None:
        """Once a process: what is wrapped already finds its callback in :data:`_evaluating`."""
        global _evaluating
        _evaluating = self
        for name in _EVALUATORS:
            module: Any = _bridge(name)
            if not hasattr(module.evaluate_and_print_results, "wsm_original"):
                module.evaluate_and_print_results = _wrapped(module.evaluate_and_print_results)

    def evaluated(self, original: Any, state: Any, prefix: str, *args: Any, **keywords: Any) -> Any:
        """``evaluate_and_print_results``, then the same of the merged weights."""
        if state is not self._state or self._driver is None:  # another run of this process
            return original(state, prefix, *args, **keywords)
        forward_step, data, model, *rest = args

        def evaluate(tag: str, batches: Any, complete: bool) -> Any:
            own = keywords if complete else keywords | dict.fromkeys(_OF_USERS & keywords.keys())
            return original(state, tag + prefix, forward_step, batches, model, *rest, **own)

        return self._driver.evaluated(state.train_state.step, data, evaluate)


_evaluating: WSMCallback | None = None
_OF_USERS = {"process_non_loss_data_func", "non_loss_data_func", "callback_manager"}
"""Keywords of ``evaluate_and_print_results`` with what users have called once an evaluation."""


def _wrapped(original: Any) -> Any:
    def evaluate_and_print_results(*args: Any, **keywords: Any) -> Any:
        assert _evaluating is not None, "wrapped by a callback"
        return _evaluating.evaluated(original, *args, **keywords)

    evaluate_and_print_results.wsm_original = original  # type: ignore[attr-defined]
    return evaluate_and_print_results


def _bridge(name: str) -> ModuleType:
    return importlib.import_module(f"megatron.bridge.training.{name}")


def _progress(context: Any) -> Progress:
    train = context.state.train_state
    return Progress(
        iteration=train.step,
        flops=train.floating_point_operations_so_far,
        scheduler=context.scheduler,
        data_iterator=None,  # callbacks do not see it
    )
