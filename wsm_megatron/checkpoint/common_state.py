"""The common state: what a Megatron checkpoint keeps beside its sharded tensors and objects.

``args``, ``iteration``, optimizer and LR scheduler settings. In ``torch_dist`` it is one
``torch.save`` archive: ``common.pt`` holding the dict up to Megatron 0.18, the entry
``common_state/shard_0_1`` holding a list of that one dict from 0.19. In ``fsdp_dtensor`` and
``torch_dcp`` every value is an archive, and an entry, of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.formats import (
    COMMON_FILE,
    COMMON_KEY,
    METADATA_FILE,
    PROVENANCE_KEY,
    CommonEntries,
    StoredCommon,
    finishing_file,
    nested,
)
from wsm_megatron.checkpoint.keys import Role
from wsm_megatron.checkpoint.layout import Layout, read_layout
from wsm_megatron.checkpoint.lr_schedule import LearningRate, learning_rate
from wsm_megatron.checkpoint.reader import CheckpointReader, read_file
from wsm_megatron.checkpoint.run_config import read_progress
from wsm_megatron.errors import MergeError
from wsm_megatron.safe_pickle.objects import load_object
from wsm_megatron.safe_pickle.opaque import OpaqueObject, is_known, references
from wsm_megatron.storage.retry import with_retries

logger = logging.getLogger(__name__)

# `lr_scheduler` is what Megatron called `opt_param_scheduler` before.
_SCHEDULER_KEYS = ("opt_param_scheduler", "lr_scheduler")
_OPTIMIZER_KEYS = ("optimizer", *_SCHEDULER_KEYS)
_CONTENT_KEY = "content_metadata"


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


def read_common(path: Path, layout: Layout | None = None) -> tuple[bytes | CommonEntries, str]:
    """A checkpoint's common state as stored, and its name for messages.

    It is ``common.pt``, or from Megatron 0.19 an entry inside the distcp files; in the formats of
    FSDP an entry for every value.

    Raises:
        MergeError: none is there.
    """
    if (path / COMMON_FILE).is_file():
        return read_file(path / COMMON_FILE), str(path / COMMON_FILE)
    layout = layout or read_layout(path, whole=False)
    found = {key: one for key, one in layout.objects.items() if one.role is Role.COMMON}
    if not found:
        raise MergeError(f"{path}: no common state, neither common.pt nor in the distcp files")
    reader = CheckpointReader(layout)
    try:
        if (entry := layout.common_entry) is not None:
            return reader.read_object(entry), f"{path}: {entry.key}"
        read = {key: reader.read_object(one) for key, one in found.items()}
        return {layout.path_of(key): data for key, data in read.items()}, f"{path}: common state"
    finally:
        reader.close()


def load_common(data: bytes | CommonEntries, where: str) -> dict[str, Any]:
    """The common state in ``data``, of any form; ``where`` names it in messages.

    Nothing is imported or called for it: instances of Megatron's classes, and of the user's, are
    :class:`~wsm_megatron.safe_pickle.opaque.OpaqueObject`. Raises ``MergeError`` for damage.
    """
    state = load_object(data, where) if isinstance(data, bytes) else nested(data, where)
    if isinstance(state, list) and len(state) == 1:
        state = state[0]
    if not isinstance(state, dict):
        raise MergeError(f"{where}: the common state is a {type(state).__name__}, not a dict")
    for key in (*_SCHEDULER_KEYS, _CONTENT_KEY):
        kind = type(state.get(key))
        if not issubclass(kind, (dict, type(None))):
            raise MergeError(f"{where}: {key} is a {kind.__name__}, not a dict; it is damaged")
    return state


def load_stored(stored: StoredCommon, where: str) -> dict[str, Any]:
    """The common state that a format would store."""
    whole = stored.file if stored.file is not None else stored.entries.get(COMMON_KEY)
    if whole is not None:
        return load_common(whole, where)
    return load_common({stored.paths[key]: data for key, data in stored.entries.items()}, where)


def summarize(state: Mapping[str, Any]) -> CommonSummary:
    """Where in training the checkpoint of this common state was taken."""
    args = attributes(state.get("args"))
    # `total_iters` is what Megatron called `iteration` before (`load_checkpoint` takes both).
    iteration = _integer(state.get("iteration", state.get("total_iters")))
    began = integer_in(args, "iteration")
    if began is not None and (iteration is None or began >= iteration):
        began = None
    return CommonSummary(
        iteration=iteration,
        consumed_samples=integer_in(args, "consumed_train_samples"),
        seq_length=integer_in(args, "seq_length"),
        began=began,
        learning_rate=learning_rate(state, args),
    )


def summary_of(path: Path, state: Mapping[str, Any]) -> CommonSummary:
    """The same of a checkpoint's common state, with what Megatron-Bridge keeps in files of its own
    where it has no ``args``."""
    summary = summarize(state)
    if "args" in state:
        return summary
    samples, length = read_progress(path)
    return replace(summary, consumed_samples=samples, seq_length=length)


def read_summary(path: Path) -> CommonSummary:
    """Where in training a checkpoint was taken, from its common state; where that has no ``args``,
    from Megatron-Bridge's files."""
    summary = summary_of(path, load_common(*read_common(path)))
    last = path / (finishing_file(path) or METADATA_FILE)
    finished = with_retries(last.stat, lambda: f"{path}: looking").st_mtime
    return replace(summary, finished=finished)


def prepare(
    state: Mapping[str, Any],
    *,
    iteration: int,
    drop_optimizer: bool,
    provenance: Mapping[str, Any],
    new_args: Mapping[str, Any] | None = None,
    where: str = "a checkpoint",
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
        where: names the newest source in messages.

    A state without ``args``, as saved by a loop on megatron-core alone, gets none. Values of
    classes and functions outside the packages that a checkpoint refers to (:func:`.inert.is_known`)
    are left out, with a warning that names them: whoever loads the merge would import and call
    them, and the weights do not depend on them.

    Raises:
        MergeError: ``args`` is of a type in which nothing can be set; or optimizer or scheduler
            state is of such classes.
    """
    merged = {key: value for key, value in state.items() if key != "total_iters"}
    changes: dict[str, Any] = {"iteration": iteration}
    if drop_optimizer:
        merged = {key: value for key, value in merged.items() if key not in _OPTIMIZER_KEYS}
        changes |= {"no_save_optim": True, "no_save_rng": True}
    if "args" in merged:
        changes |= dict(new_args or {})
        if not can_have_attributes(merged["args"]):
            kind = getattr(merged["args"], "reference", type(merged["args"]).__name__)
            raise MergeError(
                f"{where}: the common state's args are of type {kind}: cannot set "
                f"{', '.join(changes)} in them"
            )
        merged["args"] = with_attributes(merged["args"], changes)
    merged["iteration"] = iteration
    merged[PROVENANCE_KEY] = json.loads(json.dumps(provenance))  # no part of it is there twice
    return _without_foreign(merged, where)


def _without_foreign(state: dict[str, Any], where: str) -> dict[str, Any]:
    """A common state without values that are, or hold, anything of a foreign class."""
    foreign = {key: found for key, value in state.items() if (found := _foreign(value))}
    for key in (*_OPTIMIZER_KEYS, _CONTENT_KEY):
        if key in foreign:
            raise MergeError(
                f"{where}: the common state's {key} refers to {foreign[key]}, which no Megatron "
                "checkpoint needs there; --optimizer-state drop leaves optimizer and scheduler out"
            )
    kept = {key: value for key, value in state.items() if key not in foreign}
    if "args" in foreign:
        del foreign["args"]
        values = attributes(state["args"])
        foreign |= {f"args.{name}": found for name, v in values.items() if (found := _foreign(v))}
        kept["args"] = _known_args(state["args"], [n for n in values if f"args.{n}" in foreign])
        kept = {key: kept[key] for key in state if key in kept}
    if foreign:
        logger.warning(
            "%s: left out, as they are of classes that are none of Megatron's: %s",
            where,
            ", ".join(f"{name} ({found})" for name, found in foreign.items()),
        )
    return kept


def _known_args(args: Any, leave_out: Collection[str]) -> Any:
    """``args`` without some values, as a Namespace if it is of a foreign class itself."""
    kept = with_attributes(args, {}, leave_out)
    if not isinstance(kept, OpaqueObject) or is_known(kept.reference):
        return kept
    logger.warning("args, which are a %s, are written as a Namespace", kept.reference)
    return with_attributes(argparse.Namespace(), attributes(kept))


def _foreign(value: Any) -> str:
    """The foreign classes and functions in a value, by name; empty for none."""
    return ", ".join(sorted({str(one) for one in references(value) if not is_known(one)}))


def attributes(args: Any) -> dict[str, Any]:
    """The values in a checkpoint's ``args``; empty where there are none."""
    if isinstance(args, (argparse.Namespace, types.SimpleNamespace)):
        return vars(args)
    if isinstance(args, OpaqueObject) and isinstance(args.state, dict):
        return args.state
    return {}


def can_have_attributes(args: Any) -> bool:
    """Whether values can be set in a checkpoint's ``args``."""
    inert = isinstance(args, OpaqueObject) and isinstance(args.state, dict)
    return inert or isinstance(args, (argparse.Namespace, types.SimpleNamespace))


def with_attributes(args: Any, changes: Mapping[str, Any], leave_out: Collection[str] = ()) -> Any:
    """``args`` with other values, or without some; a new object of the same kind."""
    assert can_have_attributes(args)
    values = {k: v for k, v in (attributes(args) | dict(changes)).items() if k not in leave_out}
    if isinstance(args, OpaqueObject):
        return replace(args, state=values)
    made = type(args)()
    vars(made).update(values)  # setting one by one would exchange names for equal ones
    return made


def integer_in(values: Mapping[str, Any], name: str) -> int | None:
    """A value that should be an integer; None where it is none, or not there."""
    return _integer(values.get(name))


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
