"""What errors say."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.errors import MergeError, StoppedError, UsageError, printable


@given(st.text())
def test_a_message_is_one_line_that_a_terminal_only_shows(text: str) -> None:
    """A name out of a forged file may hold escape sequences."""
    for error in (MergeError(text), UsageError(text), StoppedError(text, 15)):
        assert str(error).isprintable()
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize(
    "text, shown", [("a\x1b[31mb", "a\\x1b[31mb"), ("two\nlines", "two\\nlines"), ("π", "π")]
)
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert str(MergeError(text)) == shown


def test_an_error_survives_a_pickle() -> None:
    again = pickle.loads(pickle.dumps(MergeError("why")))
    assert type(again) is MergeError and str(again) == "why"
