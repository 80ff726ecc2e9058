"""Which functions of ``megatron.training`` the plugin wraps, by version of Megatron core.

Read in each version, and run: docs/compatibility.md. That the table has one line so far is what
was found: arguments of these functions differ, names and callers do not, so that the wrappers pass
on what they do not know. A version that needs another set gets a line of its own.
"""

from __future__ import annotations

import logging
import re

logger = logging.getLogger(__name__)

Function = tuple[str, str]
"""A module of ``megatron.training``, and its function."""

_SINCE_0_14: tuple[Function, ...] = (
    ("arguments", "add_megatron_arguments"),
    ("training", "setup_model_and_optimizer"),
    ("training", "save_checkpoint"),
    ("training", "evaluate_and_print_results"),
    ("training", "checkpoint_and_decide_exit"),
    ("training", "train"),
    ("checkpointing", "schedule_async_save"),
)

_WRAPPED: dict[tuple[int, int], tuple[Function, ...]] = {(0, 14): _SINCE_0_14}
"""By the first version of which it is true."""

_LAST = (0, 20)
TESTED = (
    "core_v0.14.0, 0.15.3, 0.16.1, 0.17.1, 0.18.2, 0.19.0 and main of 2026-08-22, which is 0.20.0"
)


def wrapped_by(version: str) -> tuple[Function, ...]:
    """What is wrapped in this version (``megatron.core.__version__``).

    A version that was not tested gets the nearest one's set, with a warning.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else _LAST
    if found is None or not min(_WRAPPED) <= number <= _LAST:
        logger.warning(
            "wsm: Megatron core %s was not tested with --wsm-merge (tested: %s)", version, TESTED
        )
    since = [first for first in _WRAPPED if first <= number]
    return _WRAPPED[max(since, default=min(_WRAPPED))]
