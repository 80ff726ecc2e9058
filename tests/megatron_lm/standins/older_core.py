"""Stands in for what core 0.14 and 0.15 need of older libraries and of more attention backends.

``numpy.product`` is gone from numpy 2; mock data has tokens beyond a small vocabulary, which come
back into it here (later versions draw them from it).
"""

from __future__ import annotations

from typing import Any

import numpy

_VOCABULARY = 128


def install() -> None:
    """Call after the stand-in for CUDA."""
    numpy.product = numpy.prod  # type: ignore[attr-defined]
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset as Mock

    tokens = Mock.__getitem__

    def in_vocabulary(self: Any, index: int) -> Any:
        return tokens(self, index) % _VOCABULARY

    Mock.__getitem__ = in_vocabulary
