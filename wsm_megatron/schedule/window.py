"""Which checkpoints of a run are merged, and at which positions they lie. Pure: no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from wsm_megatron.errors import UsageError


@dataclass(frozen=True)
class Checkpoint:
    """One finished checkpoint of a run."""

    iteration: int
    """Training iteration, the number in ``iter_XXXXXXX``."""
    tokens: int | None = None
    """Training tokens up to here (:func:`count_tokens`), or None where that is not known."""
    unknown: str = field(default="", compare=False)
    """Why ``tokens`` is None: a clause that names the checkpoints, for messages."""
    lr: float | None = field(default=None, compare=False)
    """Learning rate at which it was saved, where that is known."""
    path: Path | None = field(default=None, compare=False)
    """Where it lies, if that is not its iteration's folder of the run: of a source that was
    named."""


@dataclass(frozen=True)
class Consumed:
    """How far a run had come when it saved a checkpoint; None for what is not known."""

    iteration: int
    samples: int | None
    """Training samples consumed so far (``args.consumed_train_samples``)."""
    seq_length: int | None
    """Tokens a sample, as set in the job that saved the checkpoint (``args.seq_length``)."""
    began: int | None = None
    """Iteration from which that job had started (``args.iteration``, which Megatron sets on a load
    and leaves alone while it trains)."""

    @classmethod
    def of(cls, iteration: int, tokens: int | Consumed) -> Consumed:
        """From tokens alone: as many samples of one token each."""
        return tokens if isinstance(tokens, Consumed) else cls(iteration, tokens, 1)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A selection of checkpoints. With nothing given: every checkpoint of the run.

    Either ``iterations``, or an end (``to``) and at most one way to say how far back to go
    (``from_``, ``last``, ``window_iterations``, ``window_tokens``); either may be thinned by
    ``every``, the latter by ``min_interval`` instead. Iterations that are named (``iterations``,
    ``from_``, ``to``) must be checkpoints of the run: a missing one would move an end of the window
    without a word.

    Raises ``UsageError``, naming the flags, for contradictions and numbers out of range.
    """

    iterations: tuple[int, ...] | None = None
    """``--iterations``: exactly these."""
    from_: int | None = None
    """``--from``: the oldest, included."""
    to: int | None = None
    """``--to``: the newest, included. Default: the newest of the run."""
    last: int | None = None
    """``--last``: the number of checkpoints up to ``to``, after ``every`` or ``min_interval``."""
    window_iterations: int | None = None
    """``--window-iterations``: those at ``to - window_iterations`` or later. The checkpoint at the
    very start of the window is theta_0, from which the decay begins, and belongs to it."""
    window_tokens: int | None = None
    """``--window-tokens``: the same in tokens."""
    every: int | None = None
    """``--every``: of those that the window reaches, the ones that lie a multiple of so many
    iterations before the newest. ``last=4, every=100`` are four checkpoints 100 apart."""
    min_interval: int | None = None
    """``--min-interval``: of those that the window reaches, from the newest back, the ones that lie
    at least so many iterations before the one taken last."""
    min_checkpoints: int | None = None
    """``--min-checkpoints``: fewer than these are refused."""

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.iterations is not None:
            self._check_iterations(self.iterations)
        if len(back := self._given("from_", *_BACK)) > 1:
            raise UsageError(f"{' and '.join(back)} contradict each other: give one")
        if len(thin := self._given("every", "min_interval")) > 1:
            raise UsageError(f"{' and '.join(thin)} contradict each other: give one")
        if self.from_ is not None and self.to is not None and self.from_ >= self.to:
            raise UsageError(f"--from {self.from_} must be before --to {self.to}")
        if self.last == 1:
            raise UsageError("--last 1: a merge needs at least two checkpoints")

    def _check_numbers(self) -> None:
        for name in ("from_", "to"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UsageError(f"{_FLAGS[name]} must not be negative, not {value}")
        for name in (*_BACK, "every", "min_interval", "min_checkpoints"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{_FLAGS[name]} must be at least 1, not {value}")

    def _check_iterations(self, iterations: tuple[int, ...]) -> None:
        if others := self._given("from_", "to", *_BACK, "min_interval"):
            raise UsageError(f"--iterations and {' and '.join(others)} contradict each other")
        if len(iterations) < 2:
            raise UsageError("--iterations: a merge needs at least two checkpoints")
        if repeated := sorted({i for i in iterations if iterations.count(i) > 1}):
            raise UsageError(f"--iterations names {_join(repeated)} more than once")

    def _given(self, *names: str) -> list[str]:
        return [_FLAGS[name] for name in names if getattr(self, name) is not None]


_BACK = ("last", "window_iterations", "window_tokens")
_NAMES = ("from_", "to", *_BACK, "every", "min_interval", "min_checkpoints")
_FLAGS = {name: "--" + name.strip("_").replace("_", "-") for name in _NAMES}
_LISTED = 40  # more checkpoints than that are not all listed in a message


def select(available: Sequence[Checkpoint], window: Window) -> tuple[Checkpoint, ...]:
    """The checkpoints of ``window`` among ``available`` (any order), oldest first.

    Raises ``UsageError`` for a named iteration that is not there, for fewer than two checkpoints,
    and for ``--window-tokens`` over a checkpoint whose tokens are unknown.
    """
    run = sorted(available, key=lambda c: c.iteration)
    assert all(a.iteration < b.iteration for a, b in pairwise(run)), "an iteration twice in a run"
    if not run:
        raise UsageError("the run has no finished checkpoint")
    selected = _selected(run, window)
    check_number(selected, window.min_checkpoints)
    if len(selected) < 2:
        only = (
            f"only {_join(c.iteration for c in selected)} selected" if selected else "none selected"
        )
        raise UsageError(f"a merge needs at least two checkpoints: {only}; {_existing(run)}")
    return tuple(selected)


def check_number(selected: Sequence[Checkpoint], least: int | None) -> None:
    """Raise ``UsageError`` for fewer checkpoints than ``--min-checkpoints``."""
    if least is not None and len(selected) < least:
        raise UsageError(
            f"--min-checkpoints {least}: only {len(selected)} selected "
            f"({_join(c.iteration for c in selected)})"
        )


def slide(
    available: Sequence[Checkpoint], window: Window, every: int
) -> tuple[tuple[Checkpoint, ...], ...]:
    """The window at its end, and at ends ``every``, ``2 * every``, ... iterations before it.

    Ends without a checkpoint are passed over, and so are windows that would reach back beyond the
    run's first checkpoint. Oldest end first.
    """
    run = sorted(available, key=lambda c: c.iteration)
    newest = select(run, window)[-1]
    ends = [c for c in run if c.iteration <= newest.iteration]
    ends = [c for c in ends if (newest.iteration - c.iteration) % every == 0]
    return tuple(
        select(run, replace(window, to=end.iteration))
        for end in ends
        if _is_whole(run, window, end)
    )


def _is_whole(run: list[Checkpoint], window: Window, end: Checkpoint) -> bool:
    if window.last is not None:
        return len(_thin([c for c in run if c.iteration <= end.iteration], window)) >= window.last
    assert window.window_iterations is not None
    return run[0].iteration <= end.iteration - window.window_iterations


def count_tokens(run: Sequence[Consumed]) -> tuple[Checkpoint, ...]:
    """Training tokens at consecutive checkpoints of one run, oldest first.

    The samples between two checkpoints count at the later one's sequence length: the length changes
    where a job is restarted, which is from a checkpoint. What came before the first counts at the
    first one's own length: if that is wrong, all numbers are shifted, and no distance changes.

    A checkpoint that does not say its samples or its length has None. Where an interval cannot be
    counted, all before it have None, and counting starts anew behind it: where consumed samples do
    not increase (the data position was reset, or it is another run), and where the length changed
    at a restart that lies between the two checkpoints, not at the older one.
    """
    counted: list[Checkpoint] = []
    before, tokens = None, 0
    for one in run:
        if one.samples is None or one.seq_length is None:
            counted.append(Checkpoint(one.iteration, None, _silent(one.iteration)))
            continue
        if before is None:
            tokens = one.samples * one.seq_length
        elif reason := _uncountable(before, one):
            counted = [replace(c, tokens=None, unknown=c.unknown or reason) for c in counted]
            tokens = one.samples * one.seq_length
        else:
            assert before.samples is not None
            tokens += (one.samples - before.samples) * one.seq_length
        counted.append(Checkpoint(one.iteration, tokens))
        before = one
    return tuple(counted)


def positions(checkpoints: Sequence[Checkpoint]) -> tuple[tuple[int, ...], str]:
    """Positions of checkpoints (oldest first) for the decay, and their unit.

    ``"tokens"`` where the tokens of every checkpoint are known and strictly increase, otherwise
    ``"iterations"``: never a mixture. :func:`why_iterations` says why.
    """
    if why_iterations(checkpoints):
        return tuple(c.iteration for c in checkpoints), "iterations"
    return tuple(c.tokens for c in checkpoints if c.tokens is not None), "tokens"


def why_iterations(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Why :func:`positions` are in iterations: a clause that names checkpoints; None for tokens."""
    for c in checkpoints:
        if c.tokens is None:
            return c.unknown or _silent(c.iteration)
    for a, b in pairwise(checkpoints):
        assert a.tokens is not None and b.tokens is not None
        if a.tokens >= b.tokens:
            return (
                f"tokens do not increase from iteration {a.iteration} ({a.tokens:,}) to "
                f"{b.iteration} ({b.tokens:,})"
            )
    return None


def _uncountable(before: Consumed, after: Consumed) -> str | None:
    """Why the tokens between two checkpoints cannot be known."""
    assert before.samples is not None and after.samples is not None
    if before.samples >= after.samples:
        return (
            f"consumed samples do not increase from iteration {before.iteration} "
            f"({before.samples:,}) to {after.iteration} ({after.samples:,})"
        )
    if before.seq_length == after.seq_length or after.began is None:
        return None
    if before.iteration < after.began < after.iteration:
        return (
            f"the sequence length changed from {before.seq_length} to {after.seq_length} between "
            f"iterations {before.iteration} and {after.iteration}, in a job that started from "
            f"iteration {after.began}, of which there is no checkpoint"
        )
    return None


def _silent(iteration: int) -> str:
    return f"checkpoint of iteration {iteration} does not say how many tokens it has seen"


def _selected(run: list[Checkpoint], window: Window) -> list[Checkpoint]:
    if window.iterations is not None:
        return _thin([_find(run, i, "--iterations") for i in sorted(window.iterations)], window)
    end = run[-1] if window.to is None else _find(run, window.to, "--to")
    run = [c for c in run if c.iteration <= end.iteration]
    if window.last is not None:
        return _last(_thin(run, window), window)
    return _thin(_reach(run, window), window)


def _reach(run: list[Checkpoint], window: Window) -> list[Checkpoint]:
    """The newest of a run, as far back as the window reaches."""
    if window.from_ is not None:
        start = _find(run, window.from_, "--from")
        return [c for c in run if c.iteration >= start.iteration]
    if window.window_iterations is not None:
        return _back(run, window.window_iterations, lambda c: c.iteration)
    if window.window_tokens is not None:
        return _back(run, window.window_tokens, _tokens)
    return run


def _last(thinned: list[Checkpoint], window: Window) -> list[Checkpoint]:
    assert window.last is not None
    if window.last > len(thinned):
        by = {"--every": window.every, "--min-interval": window.min_interval}
        flags = "".join(f" {flag} {value}" for flag, value in by.items() if value is not None)
        has = f"the run has {_listed(thinned)} up to there"
        raise UsageError(f"--last {window.last}{flags}: {has}{', so spaced' if flags else ''}")
    return thinned[-window.last :]


def _back(
    run: list[Checkpoint], length: int, position: Callable[[Checkpoint], int]
) -> list[Checkpoint]:
    """From the newest backwards, until one lies more than ``length`` before it."""
    start = position(run[-1]) - length
    selected: list[Checkpoint] = []
    for checkpoint in reversed(run):
        if position(checkpoint) < start:
            break
        selected.insert(0, checkpoint)
    return selected


def _thin(selected: list[Checkpoint], window: Window) -> list[Checkpoint]:
    if window.every is not None:
        end = selected[-1].iteration
        return [c for c in selected if (end - c.iteration) % window.every == 0]
    if window.min_interval is None:
        return selected
    taken = selected[-1:]
    for checkpoint in reversed(selected[:-1]):
        if taken[0].iteration - checkpoint.iteration >= window.min_interval:
            taken.insert(0, checkpoint)
    return taken


def _find(run: list[Checkpoint], iteration: int, flag: str) -> Checkpoint:
    for checkpoint in run:
        if checkpoint.iteration == iteration:
            return checkpoint
    raise UsageError(f"{flag}: no finished checkpoint of iteration {iteration}; {_existing(run)}")


def _tokens(checkpoint: Checkpoint) -> int:
    if checkpoint.tokens is None:
        reason = checkpoint.unknown or _silent(checkpoint.iteration)
        raise UsageError(f"--window-tokens: {reason}; use --window-iterations")
    return checkpoint.tokens


def _existing(run: Sequence[Checkpoint]) -> str:
    return f"the run has {_listed(run)}"


def _listed(run: Sequence[Checkpoint]) -> str:
    listed = [str(c.iteration) for c in run]
    if len(run) > _LISTED:
        listed[_LISTED // 2 : -_LISTED // 2] = ["..."]
    return ", ".join(listed)


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
