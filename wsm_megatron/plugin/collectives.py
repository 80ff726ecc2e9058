"""One outcome for all ranks: what fails on one rank fails on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from wsm_megatron.comm.messages import Failure, reports
from wsm_megatron.errors import MergeError, UsageError, is_told, mark_told

logger = logging.getLogger(__name__)

_SHOWN = 8
"""Ranks whose errors a message shows."""


def on_all_ranks(value: bool) -> bool:
    """Whether ``value`` is true on every rank. Collective over all ranks."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor([int(value)], dtype=torch.int32, device=_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return flag.item() == 1


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor, of one shape everywhere; on the CPU. Collective over all
    ranks."""
    if not dist.is_initialized():
        return values.cpu()
    summed = values.to(_device(), copy=True)
    dist.all_reduce(summed)
    return summed.cpu()


def _device() -> torch.device:
    """Of tensors that the ranks exchange."""
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")


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
    return [_shown(one) for one in _gathered_failures(error, "")]


def raise_together(error: BaseException | None, what: str) -> None:
    """Raise on every rank if any rank has an error. Collective over all ranks.

    The first rank that failed raises its own error as it is. All others raise a ``UsageError``
    where that is one, else a ``MergeError``, which names the ranks and what went wrong there; an
    error of their own is its cause. Rank 0 logs the tracebacks of internal errors, at ERROR.

    An error that was raised here before, on every rank, is raised again as it is.
    """
    failed = _gathered_failures(error, what)
    if not failed:
        return
    if is_first_rank():
        for text in reports(one for one in failed if one.traceback):
            logger.error("wsm: %s", text)
    if error is not None and (is_told(error) or _keeps(error, failed[0])):
        mark_told(error)
        raise error
    kind = UsageError if failed[0].kind == UsageError.__name__ else MergeError
    other = kind(f"{what} failed on another rank: {_all_shown(failed)}")
    mark_told(other)
    raise other from error


def _keeps(error: BaseException, first: Failure) -> bool:
    """Whether a rank ends with its own error: as the first that failed, or by a signal."""
    return first.rank == rank_and_size()[0] or not isinstance(error, Exception)


def _gathered_failures(error: BaseException | None, what: str) -> list[Failure]:
    """Of every rank with an error. Collective; a small all-reduce where there is none."""
    if on_all_ranks(error is None):
        return []
    own = None
    if error is not None:
        failure = Failure.of(error, rank_and_size()[0], what)
        own = (replace(failure, traceback="") if is_told(error) else failure).write()
    return [Failure.read(data) for data in all_gather(own) if data is not None]


def _all_shown(failed: Sequence[Failure]) -> str:
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return "; ".join(map(_shown, failed[:_SHOWN])) + more


def _shown(failure: Failure) -> str:
    return f"rank {failure.rank}: {failure.exception}: {failure.message}"
