"""Text: Python's standard library, split by files; noise in it; another text to fine-tune on."""

from __future__ import annotations

import functools
from pydoc_data.topics import topics

import numpy as np
import torch

from examples.demo.corpus import Windows, source_files

_HELD_OUT_EVERY = 10
NOISY_SAMPLES = 0.5
"""Share of the samples of the noisy mixture that are corrupted."""
NOISY_BYTES = 0.2
"""Share of the bytes of such a sample that are drawn at random."""


@functools.cache
def load_texts() -> dict[str, torch.Tensor]:
    """uint8: ``train``; ``validation`` and ``test``, a twentieth of the files each; and ``prose``,
    ``prose-test``: Python's language reference, in English, which is in none of the others.

    Selections look at ``validation`` only.
    """
    files = [path for path in source_files() if path.parent.name != "pydoc_data"]
    held_out = files[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    chosen = set(held_out)
    prose = "\n".join(topics[name] for name in sorted(topics)).encode()
    cut = len(prose) * 4 // 5
    return {
        "train": _bytes(b"\n".join(path.read_bytes() for path in files if path not in chosen)),
        "validation": _bytes(b"\n".join(path.read_bytes() for path in held_out[::2])),
        "test": _bytes(b"\n".join(path.read_bytes() for path in held_out[1::2])),
        "prose": _bytes(prose[:cut]),
        "prose-test": _bytes(prose[cut:]),
    }


def _bytes(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class NoisyWindows(Windows):
    """The same pieces, of which some, by sample number, have random bytes in them."""

    def __call__(self, first_sample: int, count: int) -> torch.Tensor:
        tokens = super().__call__(first_sample, count)
        for row, sample in zip(tokens, range(first_sample, first_sample + count), strict=True):
            random = np.random.default_rng((self.seed, sample, 1))
            if random.random() < NOISY_SAMPLES:
                hit = torch.from_numpy(random.random(len(row)) < NOISY_BYTES)
                row[hit] = torch.from_numpy(random.integers(256, size=int(hit.sum())))
        return tokens


def training_data(kind: str, seq_length: int, seed: int) -> Windows:
    """``clean`` or ``noisy`` training text, or ``prose``; the seed gives the order."""
    if kind == "noisy":
        return NoisyWindows(load_texts()["train"], seq_length, seed)
    return Windows(load_texts()["train" if kind == "clean" else kind], seq_length, seed)


def held_out_data(split: str, seq_length: int) -> Windows:
    """The same windows for all arms and seeds."""
    return Windows(load_texts()[split], seq_length, seed=0)
