"""Ways to keep main params, and what a merge of each is: the promises of such rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.reference import load_tensors, rebuilt, rounded, same_bits, split, weighted_sum64
from wsm_megatron.checkpoint.keys import Role, main_of, state_of
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.schedule.decay import coefficients

DECAY = "1-sqrt"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to keep main params.

    Attributes:
        mains: ``whole`` (float32), ``remainders``, or ``near`` (float16: rounded again when kept).
        weights: ``rounded`` from the main params, or ``quantised``.
        state: what is done with moments. moments: the dtype in which they are kept.
        smallest: elements of the smallest param; what follows it in a flat bucket is padding.
    """

    mains: str = "whole"
    weights: str = "rounded"
    state: str = "last"
    moments: torch.dtype = torch.float32
    smallest: int = 32

    @property
    def offline(self) -> Kind:
        """The same on disk, where all is float32 but remainders, and an offline merge's weights
        are its main params, rounded."""
        mains = "whole" if self.mains == "near" else self.mains
        return replace(self, mains=mains, weights="rounded", moments=torch.float32)


def assert_same(left: Path, right: Path, kind: Kind) -> None:
    """All of two checkpoints, but padding."""
    one, other = load_tensors(left), load_tensors(right)
    assert set(one) == set(other)
    for key, tensor in one.items():
        _assert_same(tensor, other[key], key, kind)


def assert_is_merge(
    run: Path, iterations: Sequence[int], kind: Kind, path: Path | None = None
) -> None:
    """A merge, the plugin's if no other is named, against a float64 reference over the float32
    values of the run's own checkpoints."""
    folder = f"iter_{iterations[-1]:07d}"
    by = coefficients([float(i) for i in iterations], DECAY)
    sources = [load_tensors(run / f"iter_{i:07d}") for i in iterations]
    actual = load_tensors(run / "wsm" / folder if path is None else path)
    entries = read_layout(run / folder).tensors
    mains = {model: key for key in entries if (model := main_of(key))}
    assert set(actual) == set(entries)
    for key, tensor in actual.items():
        role = entries[key].role
        if role is Role.MODEL and key in mains:
            values = [_value(kind, source, key, mains[key]) for source in sources]
            merged = rounded(weighted_sum64(by, values), torch.float32)
            _assert_kept(kind, merged, tensor, actual[mains[key]], key)
        elif ".bucket_idx_" in key and role is not Role.MODEL:
            if tensor.dtype in (torch.int16, torch.uint8) and role is not Role.MAIN:
                _assert_same(tensor, sources[-1][key], key, kind)
            elif tensor.dtype is torch.float32 and (role is Role.MAIN or kind.state == "merge"):
                total = weighted_sum64(by, [source[key] for source in sources])
                _assert_same(tensor, rounded(total, torch.float32), key, kind)
        elif role is Role.MOMENT:
            total = weighted_sum64(by, [source[key] for source in sources])
            expected = rounded(total, torch.float32).to(kind.moments).float()
            wanted = expected if kind.state == "merge" else sources[-1][key]
            _assert_same(tensor, wanted, key, kind)


def _value(kind: Kind, source: dict[str, torch.Tensor], model: str, main: str) -> torch.Tensor:
    if kind.mains == "remainders":
        return rebuilt(source[model], source[main])
    return source[main]


def _assert_kept(
    kind: Kind, merged: torch.Tensor, model: torch.Tensor, main: torch.Tensor, key: str
) -> None:
    """Weights and main param of a merged float32 value."""
    if kind.mains == "remainders":
        weights, remainders = split(merged)
        assert same_bits(model, weights) and same_bits(main, remainders.float()), key
        return
    if kind.mains == "near":
        assert ((main - merged).abs() <= merged.abs().max() * 2**-11).all(), key
    else:
        assert same_bits(main, merged), key
    if kind.weights == "quantised" and "norm" not in key and "embedding" not in key:
        assert ((model.float() - merged).abs() <= merged.abs().max() * 2**-4).all(), key
    else:
        assert same_bits(model, merged.to(model.dtype)), key


def assert_same_weights(before: Path, after: Path, kind: Kind) -> None:
    """Main params and the model, where a step with LR 0 lies between."""
    one, other = load_tensors(before), load_tensors(after)
    entries = read_layout(before).tensors
    for key, tensor in one.items():
        if entries[key].role in (Role.MODEL, Role.MAIN):
            if kind.mains == "near":  # and the weights are rounded from what was kept
                assert (tensor - other[key]).abs().max() <= tensor.abs().max() * 2**-7, key
            else:
                _assert_same(other[key], tensor, key, kind)
    assert any(state_of(key) or ".bucket_idx_" in key for key in one)


def _assert_same(actual: torch.Tensor, expected: torch.Tensor, key: str, kind: Kind) -> None:
    """Equal but for padding in flat buckets, which is uninitialised memory."""
    assert actual.dtype is expected.dtype, key
    if not same_bits(actual, expected):
        assert ".bucket_idx_" in key, key
        differing = (actual.view(-1) != expected.view(-1)).nonzero().flatten()
        assert all(int(i) % 64 >= kind.smallest for i in differing), key
