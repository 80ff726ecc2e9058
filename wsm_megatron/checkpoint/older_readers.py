"""``torch_dist`` as Megatron up to core 0.18 reads it, made of what later versions write.

Where the common state lies is in :mod:`.formats`; here is what must not be in it. All else,
optimizer state and its layouts included, is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from wsm_megatron.checkpoint.common_state import attributes, with_attributes
from wsm_megatron.safe_pickle.opaque import GlobalName, references

logger = logging.getLogger(__name__)

_RERUN = "rerun_state_machine"

# What torch.load(weights_only=True) admits in core_v0.16.1 (megatron/core/safe_globals.py), as far
# as args refer to it. Main's list holds all of these.
_SAFE_MODULES = ("signal", "pathlib", "pathlib._local", "collections", "torch")
_SAFE_CLASSES = {
    ("megatron.core.enums", "ModelType"),
    ("megatron.core.transformer.enums", "AttnBackend"),
    ("megatron.core.transformer.enums", "CudaGraphScope"),
    *(("megatron.core.rerun_state_machine", f"Rerun{n}") for n in ("Diagnostic", "Mode", "State")),
}


def for_common_file(state: dict[str, Any]) -> dict[str, Any]:
    """A common state that core 0.16 and later can unpickle from ``common.pt``.

    It refuses a whole file for one class that it does not know; such values are left out of
    ``args``, which a resume takes from the command line anyway.
    """
    unknown = {
        name: value
        for name, value in attributes(state.get("args")).items()
        if any(not _is_safe(reference) for reference in references(value))
    }
    if not unknown:
        return state
    logger.warning(
        "left out of args, as core 0.16 cannot read their values: %s",
        ", ".join(sorted(unknown)),
    )
    return {**state, "args": with_attributes(state["args"], {}, leave_out=unknown)}


def without_rerun_state(
    state: dict[str, Any], objects: Sequence[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A common state and its objects' keys without the rerun state machine's.

    It validates results within one job; versions of Megatron keep different things in it.
    """
    kept = {key: value for key, value in state.items() if key != _RERUN}
    return kept, tuple(key for key in objects if not key.startswith(_RERUN))


def _is_safe(reference: GlobalName) -> bool:
    return (
        reference.module in _SAFE_MODULES
        or (reference.module, reference.name) in _SAFE_CLASSES
        or reference.module.startswith("numpy")
    )
