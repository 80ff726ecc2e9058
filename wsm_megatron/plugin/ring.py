"""Which kept checkpoints form the window, with which coefficients. Pure: no tensors."""

from __future__ import annotations

from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint, Consumed, count_tokens


class Ring:
    """The kept checkpoints of one run, oldest first; the same on every rank.

    A checkpoint enters as pending, counts once confirmed, and leaves when the window has moved past
    it. A pending one does not yet push another out: should it fail, nothing is lost.
    """

    def __init__(self, config: WSMConfig) -> None:
        self._config = config
        self._kept: dict[int, Consumed] = {}
        self._pending: dict[int, Consumed] = {}

    def __contains__(self, iteration: int) -> bool:
        return iteration in self._kept or iteration in self._pending

    @property
    def kept(self) -> tuple[Checkpoint, ...]:
        """The confirmed checkpoints of the window, oldest first."""
        return count_tokens([self._kept[i] for i in sorted(self._kept)])

    @property
    def pending(self) -> tuple[int, ...]:
        return tuple(sorted(self._pending))

    def add(self, checkpoint: Consumed) -> None:
        """Take in a new checkpoint as pending."""
        assert checkpoint.iteration not in self, f"iteration {checkpoint.iteration} is kept already"
        self._pending[checkpoint.iteration] = checkpoint

    def confirm(self, iteration: int) -> tuple[int, ...]:
        """Let a pending checkpoint count. Returns the iterations that left the window."""
        self._kept[iteration] = self._pending.pop(iteration)
        kept = self.kept
        gone = tuple(c.iteration for c in kept if not self._in_window(c, kept))
        for old in gone:
            del self._kept[old]
        return gone

    def discard(self, iteration: int) -> None:
        """Forget a checkpoint, pending or kept."""
        self._pending.pop(iteration, None)
        self._kept.pop(iteration, None)

    def may_hold(self, iteration: int) -> bool:
        """Whether a checkpoint that is not kept may belong to the window that ends at the newest
        kept one: how many tokens lie between them is known only once it is kept."""
        kept, config = self.kept, self._config
        if iteration < config.start_iter:
            return False
        if config.num is not None:
            return sum(c.iteration > iteration for c in kept) < config.num
        if kept and config.window_iters is not None:
            return iteration >= kept[-1].iteration - config.window_iters
        return True

    def _in_window(self, checkpoint: Checkpoint, kept: tuple[Checkpoint, ...]) -> bool:
        if not self.may_hold(checkpoint.iteration):
            return False
        if self._config.window_tokens is None or checkpoint is kept[-1]:
            return True
        newest, own = kept[-1].tokens, checkpoint.tokens
        if newest is None or own is None:  # how far back it lies cannot be known
            return False
        return own >= newest - self._config.window_tokens

    def recipe(self) -> MergeCoefficients | None:
        """The merge of what is kept, or None while fewer than two checkpoints are."""
        if len(kept := self.kept) < 2:
            return None
        return MergeCoefficients.over(kept, self._config.decay, self._config.min_decay)


def window_size(
    config: WSMConfig, every: int | None, tokens_per_iteration: int | None
) -> int | None:
    """How many checkpoints the full window holds, or None where that cannot be known beforehand.

    Args:
        every: iterations between keeps, where regular.
        tokens_per_iteration: global batch size x sequence length, where constant.
    """
    if config.num is not None:
        return config.num
    if every is None:
        return None
    if config.window_iters is not None:
        return config.window_iters // every + 1
    if not tokens_per_iteration:
        return None
    assert config.window_tokens is not None
    return config.window_tokens // (every * tokens_per_iteration) + 1
