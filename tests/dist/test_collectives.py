"""One outcome for all ranks: who raises what, with which cause, and what rank 0 logs."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.mcore import run_ranks
from wsm_megatron.errors import MergeError, UsageError

Errors = list[BaseException | None]
CASES: dict[str, Errors] = {
    "none": [None, None, None],
    "user": [None, UsageError("too large"), None],
    "damaged": [MergeError("damaged"), None, None],
    "internal": [None, None, KeyError("a defect")],
    "two": [None, UsageError("too large"), OSError("no space")],
}
"""The error of each rank."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_all_cases, 3, tmp_path_factory.mktemp("collectives"), cuda_standin=False)


def _all_cases() -> dict[str, Any]:
    import torch.distributed as dist

    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("wsm_megatron").addHandler(handler)
    report: dict[str, Any] = {}
    for name, errors in CASES.items():
        records.clear()
        report[name] = [_raised(errors[dist.get_rank()]), [one.getMessage() for one in records]]
    return report | {"swallowed": _swallowed()}


def _raised(error: BaseException | None) -> tuple[str, str, str] | None:
    """Class, message and cause of what a rank ends with, where it passes through twice."""
    from wsm_megatron.plugin.collectives import raise_together

    first = None
    try:
        _fail_with(error)
    except Exception as caught:
        first = caught
    try:
        raise_together(first, "the block around it")
    except Exception as caught:
        assert caught is first
        return type(caught).__name__, str(caught), repr(caught.__cause__)
    return None


def _fail_with(error: BaseException | None) -> None:
    from wsm_megatron.plugin.collectives import raise_together

    caught = None
    try:
        if error is not None:
            raise error
    except BaseException as own:
        caught = own
    raise_together(caught, "the test")


def _swallowed() -> str:
    """A rank that goes on after an error of all ranks learns that the others do not."""
    import torch.distributed as dist

    from wsm_megatron.plugin.collectives import raise_together

    left = None
    try:
        _fail_with(MergeError("no luck") if dist.get_rank() == 1 else None)
    except MergeError as error:
        left = error if dist.get_rank() != 2 else None
    try:
        raise_together(left, "the block")
    except MergeError as error:
        return str(error)
    return "nothing"


def test_nothing_is_raised_where_nothing_failed(reports: list[dict[str, Any]]) -> None:
    assert [report["none"] for report in reports] == [[None, []]] * 3


@pytest.mark.parametrize("name, rank", [("user", 1), ("damaged", 0)])
def test_the_same_error_on_every_rank(reports: list[dict[str, Any]], name: str, rank: int) -> None:
    own = CASES[name][rank]
    kind = type(own).__name__
    elsewhere = f"the test failed on another rank: rank {rank}: {kind}: {own}"
    for r, report in enumerate(reports):
        assert report[name] == [(kind, str(own) if r == rank else elsewhere, "None"), []]


def test_an_internal_error_is_logged_with_its_traceback_by_rank_0_once(
    reports: list[dict[str, Any]],
) -> None:
    for rank, report in enumerate(reports):
        (kind, _, _), logged = report["internal"]
        assert kind == ("KeyError" if rank == 2 else "MergeError")
        assert len(logged) == (rank == 0)
    (text,) = reports[0]["internal"][1]
    first, *frames, last = text.splitlines()
    assert first == "wsm: rank 2 failed in the test:" and last == "KeyError: 'a defect'"
    assert any("in _fail_with" in frame for frame in frames)


def test_the_first_failure_is_what_all_raise_and_an_own_one_is_its_cause(
    reports: list[dict[str, Any]],
) -> None:
    outcomes = [report["two"][0] for report in reports]
    assert [kind for kind, _, _ in outcomes] == ["UsageError"] * 3
    for rank in (0, 2):
        assert outcomes[rank][1].endswith(
            "rank 1: UsageError: too large; rank 2: OSError: no space"
        )
    assert [cause for _, _, cause in outcomes] == ["None", "None", "OSError('no space')"]


def test_a_rank_that_goes_on_alone_is_told(reports: list[dict[str, Any]]) -> None:
    assert reports[2]["swallowed"].startswith(
        "the block failed on another rank: rank 0: MergeError"
    )
    assert reports[1]["swallowed"] == "no luck"
