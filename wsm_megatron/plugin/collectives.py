"""One outcome for all ranks: what fails on one rank fails on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from wsm_megatron.errors import MergeError


def on_all_ranks(value: bool) -> bool:
    """Whether ``value`` is true on every rank. Collective over all ranks."""
    if not dist.is_initialized():
        return value
    device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    flag = torch.tensor([int(value)], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return flag.item() == 1


def on_any_rank(value: bool) -> bool:
    """Whether ``value`` is true on at least one rank. Collective over all ranks."""
    return not on_all_ranks(not value)


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(value: Any) -> list[Any]:
    """The value of every rank, by rank; any picklable object. Collective over all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(look: Callable[[], Any], what: str) -> Any:
    """What ``look`` returns on the first rank, on every rank; any picklable object. Collective over
    all ranks.

    Raises on every rank where ``look`` raises on the first; ``what`` names it in the message.
    """
    value = None
    with together(what):
        if is_first_rank():
            value = look()
    return all_gather(value)[0]


@contextmanager
def together(what: str) -> Iterator[None]:
    """What fails within it on one rank is raised on every rank, as :func:`raise_together` does, at
    its end. Collective over all ranks: every rank comes to its end."""
    error = None
    try:
        yield
    except Exception as caught:  # raised below, on every rank
        error = caught
    raise_together(error, what)


def failures(error: BaseException | None) -> list[str]:
    """``rank R: what went wrong`` for every rank with an error. Collective over all ranks.

    One small all-reduce where nothing went wrong.
    """
    if on_all_ranks(error is None):
        return []
    messages = all_gather(None if error is None else f"{type(error).__name__}: {error}")
    return [f"rank {rank}: {text}" for rank, text in enumerate(messages) if text is not None]


def raise_together(error: BaseException | None, what: str) -> None:
    """Raise on every rank if any rank has an error. Collective over all ranks.

    A rank's own error is re-raised as it is; the others raise a ``MergeError`` that names the ranks
    and what went wrong there.
    """
    failed = failures(error)
    if error is not None:
        raise error
    if failed:
        raise MergeError(f"{what} failed on another rank: {'; '.join(failed)}")
