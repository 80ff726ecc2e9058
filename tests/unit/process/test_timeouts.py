"""How long a job waits, said in one place and in the environment."""

from __future__ import annotations

import pytest

from wsm_megatron import UsageError
from wsm_megatron.process.timeouts import VARIABLE, Timeouts


def test_the_environment_changes_what_it_names() -> None:
    ours = Timeouts()
    ours.read({VARIABLE: "lost_after=60, stop_beats=7"})
    assert (ours.lost_after, ours.stop_beats) == (60.0, 7)
    assert type(ours.stop_beats) is int
    assert ours.beat == Timeouts().beat


@pytest.mark.parametrize(
    "said", ["lost=3", "beat", "beat=", "beat=0", "beat=-1", "beat=inf", "beat=x"]
)
def test_what_is_not_understood_is_refused(said: str) -> None:
    ours = Timeouts()
    with pytest.raises(UsageError, match=VARIABLE):
        ours.read({VARIABLE: said})
    assert ours == Timeouts()


def test_nothing_said_changes_nothing() -> None:
    ours = Timeouts()
    ours.read({})
    ours.read({VARIABLE: ""})
    assert ours == Timeouts()


def test_changes_end_with_their_block() -> None:
    ours = Timeouts()
    with pytest.raises(ZeroDivisionError), ours.changed(beat=0.1):
        assert ours.beat == 0.1
        raise ZeroDivisionError
    assert ours == Timeouts()
