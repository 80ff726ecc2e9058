"""What a cell promises, against a reference of its own. Raises ``AssertionError``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.megatron_lm.checkout import Outcome
from tests.megatron_lm.matrix.table import Configuration
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import verify
from wsm_megatron.checkpoint.keys import OPTIMIZER_ROLES, Role, is_flat_bucket, main_of
from wsm_megatron.checkpoint.layout import Layout, read_layout
from wsm_megatron.schedule.decay import coefficients

DECAY = "1-sqrt"
_BYTES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merge, and what it is of.

    Attributes:
        run: the run's root, with the sources.
        path: the merged checkpoint.
        iterations: of the sources, oldest first.
        positions: of the same, in any unit.
        state: what was asked for of the optimizer state.
        from_mains: model tensors are the merged main params, also where those are not written.
    """

    run: Path
    path: Path
    iterations: Sequence[int]
    positions: Sequence[float]
    state: str = "last"
    from_mains: bool = True
    decay: str = DECAY


def assert_same_losses(merged: Outcome, plain: Outcome, iterations: int, evaluations: int) -> None:
    assert plain.returncode == 0, plain.log[-8000:]
    assert merged.returncode == 0, merged.log[-8000:]
    assert len(plain.losses) == iterations + evaluations
    assert merged.losses == plain.losses


def assert_published(run: Path, merges: Sequence[int]) -> None:
    """The trackers, and the merges that are there."""
    for root in (run, run / "wsm"):
        assert (root / "latest_checkpointed_iteration.txt").read_text() == str(merges[-1])
    names = sorted(path.name for path in (run / "wsm").glob("*iter_0*"))
    assert names == [f"iter_{iteration:07d}" for iteration in merges]
    for name in names:
        verify(run / "wsm" / name, allow_nonfinite=True)


def assert_evaluated(outcome: Outcome, configuration: Configuration) -> None:
    """Merged weights, right after each of Megatron's own evaluations."""
    at_end = ["wsm iteration 8 on validation set", "wsm iteration 8 on test set"]
    if "--async-save" in configuration.flags:  # what is not durable yet is not evaluated yet
        assert outcome.merged_losses[-2:] == at_end
    else:
        assert outcome.merged_losses == ["wsm iteration 4", "wsm iteration 8", *at_end]


def assert_is_merge(merged: Merged) -> None:
    """Every tensor against float64 sums over the run's checkpoints, bit for bit."""
    layout = read_layout(merged.run / f"iter_{merged.iterations[-1]:07d}")
    expected = _Reference(merged, layout)
    actual = _named(merged.path)
    assert set(actual) == expected.keys, sorted(set(actual) ^ expected.keys)[:3]
    for key, tensor in actual.items():
        expected.compare(key, tensor)


def assert_merged(run: Path, iterations: Sequence[int], decay: str = DECAY) -> None:
    """What the plugin published of a run with as many samples in every iteration."""
    path = run / "wsm" / f"iter_{iterations[-1]:07d}"
    assert_is_merge(
        Merged(run=run, path=path, iterations=iterations, positions=iterations, decay=decay)
    )


def assert_same_merge(one: Path, other: Path) -> None:
    """Two merges of the same sources hold the same tensors."""
    left, right = load_tensors(one), load_tensors(other)
    assert set(left) == set(right)
    flat = any(map(is_flat_bucket, left))
    for key, tensor in left.items():
        role = read_layout(one).tensors[key].role
        if is_flat_bucket(key):
            assert_same_bucket(tensor, right[key], key)
        elif not flat or role is not Role.MODEL:
            assert same_bits(tensor, right[key]), key


def assert_same_bucket(actual: torch.Tensor, expected: torch.Tensor, key: str) -> None:
    """Equal but for padding after norms of 32 elements, which is uninitialised memory."""
    differing = (actual.view(-1) != expected.view(-1)).nonzero().flatten()
    assert all(int(i) % 64 >= 32 for i in differing), key


class _Reference:
    def __init__(self, merged: Merged, layout: Layout):
        folder = merged.run
        self._merged, self._layout = merged, layout
        self._entries = layout.tensors
        self._weights = coefficients(list(map(float, merged.positions)), merged.decay)
        self._sources = [_named(folder / f"iter_{i:07d}") for i in merged.iterations]
        self._mains = {main_of(key): key for key in self._entries if main_of(key)}
        self._buckets = [
            rounded(self._total(key), torch.float32)
            for key, entry in self._entries.items()
            if entry.role is Role.MAIN and main_of(key) is None
        ]

    @property
    def keys(self) -> set[str]:
        """Of the merge."""
        dropped = OPTIMIZER_ROLES if self._merged.state == "drop" else frozenset()
        return {key for key, entry in self._entries.items() if entry.role not in dropped}

    def compare(self, key: str, actual: torch.Tensor) -> None:
        role, newest = self._entries[key].role, self._sources[-1][key]
        if role is Role.MOMENT and self._merged.state == "last":
            self._same(actual, newest, key)
        elif not newest.dtype.is_floating_point or role is Role.OPTIMIZER:
            assert same_bits(actual, newest), key
        elif role is Role.MODEL and self._buckets and self._merged.from_mains:
            self._found_in_buckets(key, actual)
        else:
            main = key
            if self._merged.from_mains and role is Role.MODEL:
                main = self._mains.get(key, key)
            exact = rounded(self._total(main), self._sources[-1][main].dtype)
            self._same(actual, exact.reshape(newest.shape).to(actual.dtype), key)

    def _same(self, actual: torch.Tensor, expected: torch.Tensor, key: str) -> None:
        if is_flat_bucket(key):
            assert_same_bucket(actual, expected, key)
        else:
            assert same_bits(actual, expected), key

    def _total(self, key: str) -> np.ndarray:
        return weighted_sum64(self._weights, [tensors[key] for tensors in self._sources])

    def _found_in_buckets(self, key: str, actual: torch.Tensor) -> None:
        """Each chunk is a run of merged main params without a model's key, rounded.

        Which run is not written anywhere; a tensor whose weights are equal in all sources to
        another's may be either's, so this says that the bits are some param's, in order.
        """
        buckets = [_raw(bucket.to(actual.dtype)) for bucket in self._buckets]
        for chunk in _chunks(self._layout, key, actual):
            assert any(chunk in bucket for bucket in buckets), f"{key}: not a merged main param"


def _named(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by the names that all formats have in common."""
    layout, tensors = read_layout(path), load_tensors(path)
    return {key: tensors[layout.stored_key(key)] for key in layout.tensors}


def _chunks(layout: Layout, key: str, tensor: torch.Tensor) -> Iterator[bytes]:
    for chunk in layout.tensors[key].chunks:
        region = tuple(
            slice(start, start + size)
            for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        yield _raw(tensor[region])


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(_BYTES[tensor.dtype]).numpy().tobytes()


def positions(plain: Outcome, iterations: Sequence[int]) -> list[float]:
    """Consumed samples at these iterations, as the run printed them."""
    samples: Mapping[int, int] = plain.samples
    return [float(samples[iteration]) for iteration in iterations]
