"""Megatron-Bridge as the plugin's trainer.

Read in ``megatron/bridge/training/{checkpointing,train,eval,state}.py`` of August 2026.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from wsm_megatron.checkpoint.bridge import RUN_CONFIG_FILE
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.config import MergeConfig
from wsm_megatron.optimizer.precision import PRECISION_ARGS
from wsm_megatron.planning.launch_flags import describe_resume
from wsm_megatron.plugin.collectives import broadcast, is_first_rank
from wsm_megatron.plugin.evaluate import tagged, write_scalars
from wsm_megatron.plugin.loader import Loaded, Loader
from wsm_megatron.plugin.patched_attrs import patched_attrs
from wsm_megatron.plugin.trainer import Progress
from wsm_megatron.schedule.window import Consumed

_NOTED = ("wandb_utils", "mlflow_utils", "comet_utils")
"""What of ``checkpointing`` records the path of a save."""


class BridgeArgs:
    """Megatron-LM's arguments, as a run of Bridge has them.

    A name is looked up in the sections of the ``ConfigContainer`` in which Bridge keeps
    Megatron-LM's arguments; those that count are in its train state. A name that no section has
    raises ``AttributeError``.

    Args:
        state: Bridge's ``GlobalState``.
    """

    _sections = ("checkpoint", "train", "validation", "scheduler", "optimizer", "ddp", "model")
    _counters = ("consumed_train_samples", "consumed_valid_samples")

    def __init__(self, state: Any) -> None:
        self._state = state
        self.iteration: int = state.train_state.step
        """From which the run was started."""

    @property
    def no_save_optim(self) -> bool:
        return not self._state.cfg.checkpoint.save_optim

    @property
    def no_load_optim(self) -> bool:
        return not self._state.cfg.checkpoint.load_optim

    def __getattr__(self, name: str) -> Any:
        if name in BridgeArgs._counters:
            return getattr(self._state.train_state, name)
        for section in BridgeArgs._sections:
            if hasattr(found := getattr(self._state.cfg, section), name):
                return getattr(found, name)
        raise AttributeError(f"no section of this run's configuration has {name!r}")


class BridgeTrainer:
    """One run of Bridge's ``pretrain()``; see :class:`.Trainer`.

    Args:
        checkpointing: ``megatron.bridge.training.checkpointing``.
        state: Bridge's ``GlobalState``, its model and optimizer built and loaded.
        interval: iterations between snapshots; None where they come with the saves.
    """

    def __init__(self, checkpointing: ModuleType, state: Any, interval: int | None) -> None:
        self._checkpointing, self._state = checkpointing, state
        self.args = BridgeArgs(state)
        self.checkpoints = BridgeLoader(checkpointing, state, self.args, interval)

    @property
    def precision(self) -> Mapping[str, Any]:
        return {name: getattr(self.args, name, None) for name in PRECISION_ARGS}

    def saves_after_training(self, iteration: int) -> bool:
        return False  # the last save is made before on_train_end

    def finish_saves(self) -> None:
        settings = self._state.cfg.checkpoint
        self._checkpointing.maybe_finalize_async_save(self._state, settings, blocking=True)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        timers = self._state.timers
        timers("interval-time").stop()
        yield
        timers("interval-time", log_level=0).start(barrier=True)

    @contextmanager
    def evaluating_merge(self, names: Sequence[str]) -> Iterator[None]:
        state = self._state
        samples = state.train_state.consumed_valid_samples
        writers = {f"_{name}": tagged(writer, names) for name, writer in self._writers().items()}
        with (
            patched_attrs(state, **writers),
            patched_attrs(state.train_state, consumed_valid_samples=samples),
        ):
            yield

    def write_scalars(self, scalars: Mapping[str, float], iteration: int) -> None:
        tensorboard, wandb, *others = self._writers().values()
        write_scalars(tensorboard, wandb, scalars, iteration)
        for writer in filter(None, others):
            writer.log_metrics(dict(scalars), step=iteration)

    def _writers(self) -> dict[str, Any]:
        """By name, those that this version knows; None on ranks without."""
        known = [name for name in _WRITERS if hasattr(self._state, f"_{name}")]
        return {name: getattr(self._state, name) for name in known}

    def save_below(
        self,
        staging: Path,
        model: Sequence[torch.nn.Module],
        optimizer: Any,
        progress: Progress,
        provenance: dict[str, Any],
        *,
        drop: bool,
    ) -> None:
        ck, settings = self._checkpointing, self._state.cfg.checkpoint
        elsewhere = {"save": str(staging), "async_save": False, "most_recent_k": -1}
        generate = _generator(ck.generate_state_dict, provenance)
        with patched_attrs(settings, save_optim=settings.save_optim and not drop):
            with (
                patched_attrs(ck, generate_state_dict=generate),
                _unnoted(ck),
                patched_attrs(settings, **elsewhere),
            ):
                ck.save_checkpoint(
                    self._state,
                    model,
                    optimizer,
                    progress.scheduler,
                    progress.flops,
                    {},  # the cached save strategy belongs to the run
                    train_data_iterator=progress.data_iterator,
                )
            if is_first_rank():  # the run's own settings, and not those of this save
                written = checkpoint_path(staging, progress.iteration)
                self._state.cfg.to_yaml(str(written / RUN_CONFIG_FILE))

    def resume(self, iteration: int, config: MergeConfig) -> dict[str, Any]:
        """Bridge has no launch flags: what is said of them is for Megatron-LM."""
        return describe_resume({"iteration": iteration}, config)


_WRITERS = ("tensorboard_logger", "wandb_logger", "mlflow_logger", "comet_logger")


class BridgeLoader(Loader):
    """Loads through ``load_checkpoint`` of ``megatron.bridge.training.checkpointing``."""

    def __init__(
        self, checkpointing: ModuleType, state: Any, args: BridgeArgs, interval: int | None
    ) -> None:
        super().__init__(args, interval)
        self._checkpointing, self._state = checkpointing, state

    def _started(self) -> Loaded:
        train = self._state.train_state
        return self._loaded(train.step, train.consumed_train_samples)

    def _load(self, iteration: int | None, root: Path | None = None) -> Loaded:
        """The counters of the train state are left as they were."""
        settings, changes = self._state.cfg.checkpoint, dict[str, Any]()
        if iteration is not None:
            changes = {"ckpt_step": iteration, "non_persistent_ckpt_type": None}
            changes |= {} if root is None else {"load": str(root)}
        own = copy.copy(self._state.train_state)
        with (
            patched_attrs(settings, **changes),
            patched_attrs(self._state, train_state=own),
        ):
            self._checkpointing.load_checkpoint(
                self._state, self._model, self._optimizer, None, checkpointing_context={}
            )
            found = self._state.train_state
            return self._loaded(found.step, found.consumed_train_samples)

    def _loaded(self, iteration: int, samples: int) -> Loaded:
        """What its ``run_config.yaml`` says besides. Bridge does not note where a job began."""
        saved = broadcast(lambda: self._run_config(iteration), f"reading of iteration {iteration}")
        length = saved.get("model", {}).get("seq_length")
        every = saved.get("checkpoint", {}).get("save_interval")
        return Loaded(Consumed(iteration, samples, length), every)

    def _run_config(self, iteration: int) -> dict[str, Any]:
        """None is there before the first save: then it is the run's own."""
        settings = self._state.cfg.checkpoint
        if settings.load and iteration:
            path = checkpoint_path(Path(settings.load), iteration) / RUN_CONFIG_FILE
            if path.is_file():
                return yaml.safe_load(path.read_bytes()) or {}
        own = {"save_interval": settings.save_interval}
        return {"model": {"seq_length": self._state.cfg.model.seq_length}, "checkpoint": own}


def _generator(
    original: Callable[..., dict[str, Any]], provenance: Any
) -> Callable[..., dict[str, Any]]:
    """``generate_state_dict`` that adds the provenance."""

    def generate_state_dict(*positional: Any, **keywords: Any) -> dict[str, Any]:
        return {**original(*positional, **keywords), "wsm_merge": provenance}

    return generate_state_dict


@contextmanager
def _unnoted(checkpointing: Any) -> Iterator[None]:
    """Within it, no tracker of experiments hears of a save: it goes elsewhere afterwards."""
    owners = [getattr(checkpointing, name) for name in _NOTED if hasattr(checkpointing, name)]
    originals = [owner.on_save_checkpoint_success for owner in owners]
    try:
        for owner in owners:
            owner.on_save_checkpoint_success = lambda *_, **__: None
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.on_save_checkpoint_success = original
