"""How to launch Megatron from a merge, as lines."""

from __future__ import annotations

from collections.abc import Iterator

from wsm_megatron.planning.launch_flags import GOALS


def launch_lines(launches: dict[str, dict[str, str]], root: str) -> Iterator[str]:
    """The flags of every goal, each with what happens then; from ``flags.as_data``."""
    if launches:
        yield "launch Megatron with the run's own flags and these:"
    for goal, launch in launches.items():
        yield f"  {GOALS[goal]}: {' '.join(filter(None, ('--load', root, launch['flags'])))}"
        yield f"      {launch['effect']}"
