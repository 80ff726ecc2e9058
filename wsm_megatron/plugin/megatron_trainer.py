"""Megatron-LM as the plugin's trainer: the functions of ``megatron.training`` that it calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from wsm_megatron.config import MergeConfig
from wsm_megatron.planning.launch_flags import describe_resume
from wsm_megatron.plugin.evaluate import tagged, write_scalars
from wsm_megatron.plugin.megatron_loader import MegatronLoader
from wsm_megatron.plugin.patched_attrs import patched_attrs
from wsm_megatron.plugin.trainer import Progress


class MegatronTrainer:
    """One run of ``pretrain()``; see :class:`.Trainer`.

    Args:
        training: ``megatron.training.training``.
        checkpointing: ``megatron.training.checkpointing``.
        save_checkpoint: Megatron's own function, not the plugin's wrapper around it.
        args: Megatron's arguments.
        interval: iterations between snapshots; None where they come with the saves.
    """

    def __init__(
        self,
        *,
        training: ModuleType,
        checkpointing: ModuleType,
        save_checkpoint: Callable[..., Any],
        args: Any,
        interval: int | None,
    ) -> None:
        self._training, self._checkpointing = training, checkpointing
        self._save_checkpoint = save_checkpoint
        self.args = args
        self.checkpoints = MegatronLoader(checkpointing, args, interval)

    @property
    def precision(self) -> Mapping[str, Any]:
        return vars(self.args)

    def saves_after_training(self, iteration: int) -> bool:
        every = self.args.save_interval
        return bool(self.args.save and every and iteration % every)

    def finish_saves(self) -> None:
        self._training.maybe_finalize_async_save(blocking=True)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        timers = self._training.get_timers()
        timers("interval-time").stop()
        yield
        timers("interval-time", log_level=0).start(barrier=True)

    @contextmanager
    def evaluating_merge(self, names: Sequence[str]) -> Iterator[None]:
        samples = self.args.consumed_valid_samples
        writers = {name: _tagging(getattr(self._training, name), names) for name in _WRITERS}
        with (
            patched_attrs(self._training, **writers),
            patched_attrs(self.args, consumed_valid_samples=samples),
        ):
            yield

    def write_scalars(self, scalars: Mapping[str, float], iteration: int) -> None:
        tensorboard, wandb = (getattr(self._training, name)() for name in _WRITERS)
        write_scalars(tensorboard, wandb, scalars, iteration)

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
        ck, args = self._checkpointing, self.args
        generate = _generator(ck.generate_state_dict, provenance, args)
        with (
            patched_attrs(ck, generate_state_dict=generate),
            patched_attrs(ck.wandb_utils, on_save_checkpoint_success=lambda *_, **__: None),
            patched_attrs(
                args,
                save=str(staging),
                async_save=False,
                save_retain_interval=None,
                no_save_optim=args.no_save_optim or drop,
            ),
        ):
            self._save_checkpoint(
                progress.iteration,
                model,
                optimizer,
                progress.scheduler,
                progress.flops,
                {},  # the cached save strategy belongs to the run
                train_data_iterator=progress.data_iterator,
                preprocess_common_state_dict_fn=self._training.preprocess_common_state_dict,
            )

    def resume(self, iteration: int, config: MergeConfig) -> dict[str, Any]:
        """The LR scheduler's clock is the consumed samples."""
        args = self.args
        steps = {"num_steps": getattr(args, "consumed_train_samples", 0)}
        state = {"args": args, "iteration": iteration, "opt_param_scheduler": steps}
        return describe_resume(state, config)


_WRITERS = ("get_tensorboard_writer", "get_wandb_writer")


def _tagging(original: Callable[[], Any], names: Sequence[str]) -> Callable[[], Any]:
    return lambda: tagged(original(), names)


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
