"""Whose fault it is: the user's, the storage's, or this package's; and what is kept then."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.merge.test_continued import ALONE, stop_after
from tests.reference import RUNS
from wsm_megatron import MergeConfig, MergeError, UsageError, merge, publication
from wsm_megatron.access import shared
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE, StorageError, exit_code, printable
from wsm_megatron.process.signals import StoppedError


@pytest.mark.parametrize(
    "error, status",
    [
        (UsageError("no such run"), EXIT_USAGE),
        (MergeError("damaged"), EXIT_FAILED),
        (StorageError("no space"), EXIT_FAILED),
        (StoppedError("stopped", 15), 128 + 15),
        (ValueError("zip() argument 2 is shorter than argument 1"), EXIT_FAILED),
        (KeyError("a defect"), EXIT_FAILED),
    ],
)
def test_exit_status(error: Exception, status: int) -> None:
    assert exit_code(error) == status


def test_who_caught_value_errors_catches_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        merge(MergeConfig(load=tmp_path / "none", save=tmp_path / "out"))
    assert type(caught.value) is UsageError


def defect(*_: Any) -> Any:
    """As where lists that belong together are not of one length."""
    return list(zip([1, 2], [1], strict=True))


def test_an_internal_value_error_shows_its_traceback(tmp_path: Path) -> None:
    script = f"""
        import sys

        from wsm_megatron.__main__ import run
        from wsm_megatron.access import shared

        shared.prepare_job = lambda *_: list(zip([1, 2], [1], strict=True))
        load, save = {str(RUNS / runs.DENSE)!r}, {str(tmp_path / "out")!r}
        sys.argv = ["wsm", "merge", "--load", load, "--save", save]
        run()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == EXIT_FAILED
    assert done.stderr.count("Traceback (most recent call last)") == 1
    last = done.stderr.splitlines()[-1]
    assert last == "ValueError: zip() argument 2 is shorter than argument 1"


def left_after(config: MergeConfig, error: type[Exception]) -> list[str]:
    """What a merge leaves that ends in an error."""
    with pytest.raises(error) as caught:
        merge(config, ALONE)
    assert type(caught.value) is error
    return sorted(path.name for path in config.save.iterdir())


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    return MergeConfig(load=RUNS / runs.DENSE, save=tmp_path / "out")


@pytest.mark.parametrize(
    "owner, name", [(shared, "prepare_job"), (publication, "placement"), (publication, "complete")]
)
def test_an_internal_error_keeps_what_is_finished(
    config: MergeConfig, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """In planning, in front of the target, and just before publication."""
    stopped = stop_after(monkeypatch, config, 3)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, defect)
        assert stopped.name in left_after(config, ValueError)
    done = merge(config, ALONE)
    everything = (done.output / "__0_0.distcp").stat().st_size
    assert everything - done.bytes_written > 0, "it started over"


def _raise(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error, kept",
    [(UsageError("x"), False), (MergeError("x"), False), (StorageError("x"), True)],
)
def test_what_can_go_on_is_kept_and_nothing_else(
    config: MergeConfig, monkeypatch: pytest.MonkeyPatch, error: Exception, kept: bool
) -> None:
    monkeypatch.setattr(publication, "complete", _raise(error))
    assert bool(left_after(config, type(error))) == kept


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
