"""Which checkpoints of a run are merged: options, and the windows that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from wsm_megatron.errors import UsageError
from wsm_megatron.options import COUNT, Options, list_of, option
from wsm_megatron.schedule.window import Window

WHICH = "which checkpoints"
"""The heading that these options stand under."""


@dataclass(frozen=True, kw_only=True)
class WindowOptions(Options):
    """Selections of source checkpoints."""

    iterations: tuple[int, ...] | None = option(
        "exactly these iterations: 1000,2000,4000", list_of(COUNT), None, group=WHICH
    )
    from_: int | None = option("oldest iteration, included", COUNT, None, group=WHICH, metavar="I")
    to: int | None = option(
        "newest iteration, included",
        COUNT,
        None,
        default_text="the tracker's",
        group=WHICH,
        metavar="I",
    )
    last: int | None = option("the N newest, up to --to", COUNT, None, group=WHICH)
    window_iterations: tuple[int, ...] | None = option(
        "the last I iterations up to --to, both ends included; several make several merges",
        list_of(COUNT),
        None,
        group=WHICH,
        metavar="I,...",
    )
    window_tokens: tuple[int, ...] | None = option(
        "the last T tokens up to --to, both ends included: 500M, 2B; several make several merges",
        list_of(COUNT),
        None,
        group=WHICH,
        metavar="T,...",
    )
    every: int | None = option(
        "of those, only multiples of I iterations back from the newest; with --last N, N of them",
        COUNT,
        None,
        group=WHICH,
        metavar="I",
    )
    min_interval: int | None = option(
        "of those, from the newest back, only ones that lie at least I iterations before the one "
        "taken last; with --last N, N of them",
        COUNT,
        None,
        group=WHICH,
        metavar="I",
    )
    min_checkpoints: int | None = option("refuse to merge fewer than N", COUNT, None, group=WHICH)

    sliding_every: int | None = option(
        "also merge the windows that end S, 2S, ... iterations before --to, as far back as the run "
        "has them in full",
        COUNT,
        None,
        group=WHICH,
        metavar="S",
        least=1,
    )

    @property
    def windows(self) -> tuple[Window, ...]:
        """The selections of source checkpoints, all ending at ``to``."""
        iterations = self.window_iterations or (None,)
        tokens = self.window_tokens or (None,)
        return tuple(
            Window(
                iterations=self.iterations,
                from_=self.from_,
                to=self.to,
                last=self.last,
                window_iterations=i,
                window_tokens=t,
                every=self.every,
                min_interval=self.min_interval,
                min_checkpoints=self.min_checkpoints,
            )
            for i in iterations
            for t in tokens
        )

    def given_windows(self) -> list[str]:
        """Flags of the options that select checkpoints, of those that were given."""
        names = {one.name for one in fields(WindowOptions)} - {"min_checkpoints"}
        given = [one for one in self.options() if one.name in names]
        return [one.flag for one in given if getattr(self, one.name) is not None]

    def check_windows(self) -> None:
        """Raise ``UsageError`` for options that contradict each other."""
        windows = self.windows  # contradictions between the window's options raise here
        if len(set(windows)) < len(windows):
            raise UsageError("the same window is named twice")
        slides = self.last is not None or self.window_iterations is not None
        if self.sliding_every is not None and not slides:
            raise UsageError("--sliding-every needs --last or --window-iterations to slide")
