"""Real text that every machine has: the sources of Python's own standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch

_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT_EVERY = 20


def source_files() -> list[Path]:
    """All .py files of the standard library but for its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)
    )


def load_corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out bytes, uint8; every 20th file is held out."""
    files = source_files()
    held_out = files[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    chosen = set(held_out)
    return _bytes([path for path in files if path not in chosen]), _bytes(held_out)


def _bytes(files: list[Path]) -> torch.Tensor:
    return torch.frombuffer(
        bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8
    )


class Windows:
    """``data(first_sample, count)``: pieces of the text at places drawn by sample number.

    The same numbers give the same pieces, so losses of different weights are paired.
    """

    def __init__(self, text: torch.Tensor, seq_length: int, seed: int) -> None:
        self.text = text
        self.length = seq_length + 1
        self.seed = seed

    def __call__(self, first_sample: int, count: int) -> torch.Tensor:
        """Tokens (bytes) as int64, shape (count, seq_length + 1)."""
        pieces = []
        for sample in range(first_sample, first_sample + count):
            random = np.random.default_rng((self.seed, sample))
            start = int(random.integers(len(self.text) - self.length))
            pieces.append(self.text[start : start + self.length])
        return torch.stack(pieces).long()
