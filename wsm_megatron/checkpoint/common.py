"""The common state: what a Megatron checkpoint keeps beside its sharded tensors and objects.

``args``, ``iteration``, optimizer and LR scheduler settings. It is one ``torch.save`` archive:
``common.pt`` holding the dict up to Megatron 0.18, the entry ``common_state/shard_0_1`` holding a
list of that one dict from 0.19.
"""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from wsm_megatron.checkpoint.inert import Inert
from wsm_megatron.checkpoint.objects import dump_object, load_object
from wsm_megatron.checkpoint.schedule import LearningRate, learning_rate
from wsm_megatron.errors import MergeError

PROVENANCE_KEY = "wsm_merge"
"""Where a merged checkpoint's common state says how it was made. Megatron's ``load_checkpoint``
reads the loaded state by key and passes over keys that it does not know."""

# `lr_scheduler` is what Megatron called `opt_param_scheduler` before.
_OPTIMIZER_KEYS = ("optimizer", "opt_param_scheduler", "lr_scheduler")


@dataclass(frozen=True)
class CommonSummary:
    """Where in training a checkpoint was taken; None for what its common state does not say."""

    iteration: int | None
    """Completed iterations: the state's own, as ``args.iteration`` is that of the job's start."""
    consumed_samples: int | None
    """Training samples consumed (``args.consumed_train_samples``)."""
    seq_length: int | None
    """Tokens a sample, when the checkpoint was saved."""
    began: int | None = None
    """Iteration from which the job that saved it had started: ``args.iteration``. None too where
    that is the checkpoint's own, as other writers than Megatron have it."""
    learning_rate: LearningRate | None = None
    finished: float | None = None
    """When ``metadata.json`` was written, in seconds since the epoch; not in the state itself."""

    @property
    def tokens(self) -> int | None:
        """Training tokens consumed, if the run's sequence length has always been this one."""
        if self.consumed_samples is None or self.seq_length is None:
            return None
        return self.consumed_samples * self.seq_length


UNKNOWN = CommonSummary(None, None, None)


def load_common(data: bytes, where: str) -> dict[str, Any]:
    """The common state in ``data``, of either form; ``where`` names it in messages.

    Nothing is imported or called for it: instances of Megatron's classes are
    :class:`~wsm_megatron.checkpoint.inert.Inert`. Raises ``MergeError`` for damage, and for a
    reference to anything that a checkpoint has no use for.
    """
    state = load_object(data, where)
    if isinstance(state, list) and len(state) == 1:
        state = state[0]
    if not isinstance(state, dict):
        raise MergeError(f"{where}: the common state is a {type(state).__name__}, not a dict")
    return state


def dump_common(state: Mapping[str, Any], *, in_distcp: bool = False) -> bytes:
    """The archive of a common state, as ``common.pt`` or, ``in_distcp``, as Megatron 0.19's entry.

    References are written back as they were read. Raises ``MergeError`` for an object of a class
    that :func:`load_common` would not admit.
    """
    return dump_object([dict(state)] if in_distcp else dict(state))


def summarize(state: Mapping[str, Any]) -> CommonSummary:
    """Where in training the checkpoint of this common state was taken."""
    args = attributes(state.get("args"))
    # `total_iters` is what Megatron called `iteration` before (`load_checkpoint` takes both).
    iteration = _integer(state.get("iteration", state.get("total_iters")))
    began = _integer(args.get("iteration"))
    if began is not None and (iteration is None or began >= iteration):
        began = None
    return CommonSummary(
        iteration=iteration,
        consumed_samples=_integer(args.get("consumed_train_samples")),
        seq_length=_integer(args.get("seq_length")),
        began=began,
        learning_rate=learning_rate(state, args),
    )


def prepare(
    state: Mapping[str, Any],
    *,
    iteration: int,
    drop_optimizer: bool,
    provenance: Mapping[str, Any],
    new_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The common state of a merged checkpoint, from that of its newest source; a copy.

    Args:
        iteration: what the merged checkpoint is saved under.
        drop_optimizer: whether optimizer state and RNG state are left out. Then the state is what
            Megatron saves with ``--no-save-optim --no-save-rng``: no ``optimizer``, no scheduler,
            and both flags set in ``args``, by which ``load_checkpoint`` knows not to ask the
            checkpoint for either. ``content_metadata`` stays: Megatron writes it with or without.
        provenance: how the merge was made, of JSON types, kept under :data:`PROVENANCE_KEY`.
        new_args: further values for ``args``.

    A state without ``args``, as saved by a loop on megatron-core alone, gets none.

    Raises:
        MergeError: ``args`` is of a type in which nothing can be set.
    """
    merged = {key: value for key, value in state.items() if key != "total_iters"}
    changes: dict[str, Any] = {"iteration": iteration}
    if drop_optimizer:
        merged = {key: value for key, value in merged.items() if key not in _OPTIMIZER_KEYS}
        changes |= {"no_save_optim": True, "no_save_rng": True}
    if "args" in merged:
        merged["args"] = with_attributes(merged["args"], changes | dict(new_args or {}))
    merged["iteration"] = iteration
    # A pickle says which objects in it are one. Through JSON none are, whoever made them: equal
    # merges are equal bytes.
    merged[PROVENANCE_KEY] = json.loads(json.dumps(provenance))
    return merged


def attributes(args: Any) -> dict[str, Any]:
    """The values in a checkpoint's ``args``; empty where there are none."""
    if isinstance(args, (argparse.Namespace, types.SimpleNamespace)):
        return vars(args)
    if isinstance(args, Inert) and isinstance(args.state, dict):
        return args.state
    return {}


def with_attributes(args: Any, changes: Mapping[str, Any], leave_out: Collection[str] = ()) -> Any:
    """``args`` with other values, or without some; a new object of the same kind."""
    values = {k: v for k, v in (attributes(args) | dict(changes)).items() if k not in leave_out}
    if isinstance(args, (argparse.Namespace, types.SimpleNamespace)):
        made = type(args)()
        vars(made).update(values)  # setattr may put another, interned string for a name
        return made
    if isinstance(args, Inert) and isinstance(args.state, dict):
        return replace(args, state=values)
    raise MergeError(
        f"the common state's args are of type {type(args).__name__}: cannot set "
        f"{', '.join(changes)} in them"
    )


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
