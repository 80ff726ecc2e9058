"""The paired evaluation: merged weights on the very batches that the trained ones were given."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Recorder:
    """A data iterator that remembers what it handed out.

    A tensor that equals the one of the same name in the batch before (the causal mask, the position
    ids) is remembered once.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._batches: list[Any] = []

    def __iter__(self) -> Recorder:
        return self

    def __next__(self) -> Any:
        batch = next(self._source)
        self._batches.append(self._shared(batch))
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def replay(self) -> Iterator[Any]:
        """The same batches once more."""
        return iter(self._batches)

    def _shared(self, batch: Any) -> Any:
        last = self._batches[-1] if self._batches else None
        if not isinstance(batch, dict) or not isinstance(last, dict):
            return batch
        return {key: _same_or_new(last.get(key), value) for key, value in batch.items()}


def _same_or_new(old: Any, new: Any) -> Any:
    tensors = isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
    return old if tensors and old.shape == new.shape and torch.equal(old, new) else new


def record(data_iterator: Any) -> Any:
    """Recorders in the shape that Megatron passes iterators: one, none, or a list of those."""
    if data_iterator is None:
        return None
    if isinstance(data_iterator, list):
        return [record(one) for one in data_iterator]
    return Recorder(data_iterator)


def replay(recorded: Any) -> Any:
    """What :func:`record` remembered, as iterators in the same shape."""
    if isinstance(recorded, list):
        return [replay(one) for one in recorded]
    return None if recorded is None else recorded.replay()


class _Tagged:
    """A writer of TensorBoard, W&B, MLflow or Comet that writes everything once under each of
    several names."""

    def __init__(self, writer: Any, names: Sequence[str]) -> None:
        self._writer, self._names = writer, names

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> None:
        for name in self._names:
            self._writer.add_scalar(f"{name} {tag}", *args, **kwargs)

    def log(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._writer.log(self._named(values), *args, **kwargs)

    def log_metrics(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._writer.log_metrics(self._named(values), *args, **kwargs)

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        return {f"{name} {k}": v for name in self._names for k, v in values.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def tagged(writer: Any, names: Sequence[str]) -> Any:
    """The writer, or none, that writes what it is given under each name: the name comes first."""
    return _Tagged(writer, names) if writer else writer


def write_scalars(
    tensorboard: Any, wandb: Any, scalars: Mapping[str, float], iteration: int
) -> None:
    """To the writers that there are on this rank."""
    if tensorboard:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(dict(scalars), iteration)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave every random generator as it was: Python's, NumPy's, torch's and Megatron's."""
    import numpy as np
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    python, numpy_, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    tracked = tracker.get_states()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(torch_)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        tracker.set_states(tracked)
