"""What Megatron-Bridge keeps beside a checkpoint's tensors, brought up to date for a merge.

Read in ``save_checkpoint``, ``_load_checkpoint_from_path`` and ``_resolve_checkpoint_iteration`` of
``megatron/bridge/training/checkpointing.py`` and in ``TrainState`` (August 2026). There are no
``args``: iteration and consumed samples come from ``train_state.pt``, which checkpoint is the
latest from a copy of that beside the tracker, and whether optimizer and RNG states are there from
``run_config.yaml``.
"""

from __future__ import annotations

import torch
import yaml

from wsm_megatron.errors import MergeError
from wsm_megatron.safe_pickle.objects import dump_object, load_object

TRAIN_STATE_FILE = "train_state.pt"
LATEST_FILE = "latest_train_state.pt"
"""A copy of the latest checkpoint's, in the root; Bridge looks for it before the tracker."""
RUN_CONFIG_FILE = "run_config.yaml"
MOST_BYTES = 2**20
"""Larger files of these names are something else."""

_SAVED = {"save_optim", "save_rng"}


def with_step(data: bytes, step: int, where: str) -> bytes:
    """A ``train_state.pt`` that says another iteration; the same bytes where it says this one.

    Args:
        where: names it in messages.

    Raises:
        MergeError: not a dict of tensors that holds ``step``.
    """
    state = load_object(data, where)
    old = state.get("step") if isinstance(state, dict) else None
    if not isinstance(old, torch.Tensor) or old.shape or old.dtype != torch.int64:
        raise MergeError(f"{where}: no train state of Megatron-Bridge: it holds no step")
    if int(old) == step:
        return data
    return dump_object({**state, "step": torch.tensor(step, dtype=old.dtype)})


def consumed_samples(data: bytes, where: str) -> int | None:
    """Training samples by a ``train_state.pt``; None where it is no state of Bridge's."""
    state = load_object(data, where)
    found = state.get("consumed_train_samples") if isinstance(state, dict) else None
    whole = isinstance(found, torch.Tensor) and not found.shape and found.dtype == torch.int64
    return int(found) if whole and isinstance(found, torch.Tensor) else None


def without_optimizer(data: bytes) -> bytes:
    """A ``run_config.yaml`` that says the checkpoint holds no optimizer and no RNG states.

    Bridge would look for them, and stop with a ``KeyError``. A file without these settings, or that
    is no YAML, is not Bridge's and stays as it is.
    """
    try:
        config = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        return data  # a tag with a value that is none of its kind raises the last four
    settings = config.get("checkpoint") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or not settings.keys() & _SAVED:
        return data
    settings.update({name: False for name in _SAVED if name in settings})
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
