"""Where two common states differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

from wsm_megatron.checkpoint.common_state import attributes
from wsm_megatron.safe_pickle.opaque import OpaqueObject


def differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Names of the parts that are not the same in two objects of :func:`.objects.load_object`.

    ``args.lr`` for an attribute, ``optimizer.param_groups.0.lr`` for parts of dicts and lists.
    Tensors are compared bit for bit, floats by value, NaN being itself.
    """
    if type(left) is not type(right):
        yield where
    elif isinstance(left, torch.Tensor):
        if left.dtype != right.dtype or left.shape != right.shape or _bits(left) != _bits(right):
            yield where
    elif isinstance(left, dict):
        yield from _of_mappings(left, right, where)
    elif isinstance(left, (list, tuple)):
        yield from _of_mappings(dict(enumerate(left)), dict(enumerate(right)), where)
    elif isinstance(left, OpaqueObject):
        for field in fields(OpaqueObject):
            ours, theirs = getattr(left, field.name), getattr(right, field.name)
            yield from differences(ours, theirs, where)
    elif attributes(left) or attributes(right):
        yield from _of_mappings(attributes(left), attributes(right), where)
    elif left != right and not (left != left and right != right):  # NaN differs from itself
        yield where


def _of_mappings(left: dict[Any, Any], right: dict[Any, Any], where: str) -> Iterator[str]:
    for key in [*left, *(key for key in right if key not in left)]:
        name = f"{where}.{key}" if where else str(key)
        if key not in left or key not in right:
            yield name
        else:
            yield from differences(left[key], right[key], name)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
