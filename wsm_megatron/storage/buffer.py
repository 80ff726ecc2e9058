"""Elements in memory and their bytes: what tensors are read into and written from."""

from __future__ import annotations

import torch


class Buffer:
    """A one-dimensional contiguous CPU tensor and a view of its memory, made once for many reads.

    Attributes:
        elements: the tensor.
        data: the same memory as bytes.
        address: where it begins.
    """

    __slots__ = ("address", "data", "elements")

    def __init__(self, elements: torch.Tensor):
        self.elements = elements
        self.data: memoryview = elements.view(torch.uint8).numpy().data
        self.address: int = elements.data_ptr()

    @staticmethod
    def empty(numel: int, dtype: torch.dtype) -> Buffer:
        return Buffer(torch.empty(numel, dtype=dtype))

    def part(self, start: int, numel: int) -> Buffer:
        """A view of some of the elements."""
        return Buffer(self.elements.narrow(0, start, numel))
