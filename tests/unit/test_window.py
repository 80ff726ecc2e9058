"""Selecting checkpoints of a run and their positions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.window import Checkpoint, Window, positions, select

RUN = [Checkpoint(i, i * 10) for i in (4000, 1000, 3000, 2000, 5000)]

runs = st.lists(st.integers(0, 200), min_size=2, max_size=30, unique=True).map(
    lambda iterations: [Checkpoint(i, 7 * i) for i in iterations]
)


def chosen(window: Window, run: list[Checkpoint] = RUN) -> list[int]:
    return [c.iteration for c in select(run, window)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1000, 2000, 3000, 4000, 5000]),
        ({"iterations": (4000, 1000)}, [1000, 4000]),
        ({"from_": 2000, "to": 4000}, [2000, 3000, 4000]),
        ({"from_": 3000}, [3000, 4000, 5000]),
        ({"to": 3000}, [1000, 2000, 3000]),
        ({"last": 3}, [3000, 4000, 5000]),
        ({"last": 2, "to": 4000}, [3000, 4000]),
        ({"window_iterations": 2000}, [3000, 4000, 5000]),
        ({"window_iterations": 1999}, [4000, 5000]),
        ({"window_iterations": 2000, "to": 4000}, [2000, 3000, 4000]),
        ({"window_iterations": 10**9}, [1000, 2000, 3000, 4000, 5000]),
        ({"window_tokens": 20_000}, [3000, 4000, 5000]),
        ({"window_tokens": 29_999, "to": 4000}, [2000, 3000, 4000]),
        ({"every": 2000}, [1000, 3000, 5000]),
        ({"every": 2000, "to": 4000}, [2000, 4000]),
        ({"every": 2000, "last": 4}, [3000, 5000]),
        ({"every": 4000, "iterations": (1000, 3000, 5000)}, [1000, 5000]),
    ],
)
def test_selection(options: dict[str, Any], expected: list[int]) -> None:
    assert chosen(Window(**options)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": (1, 2), "to": 2}, "--iterations and --to"),
        ({"iterations": (1, 2), "from_": 1, "last": 2}, "--iterations and --from and --last"),
        ({"iterations": (1, 2), "window_tokens": 2}, "--iterations and --window-tokens"),
        ({"iterations": (1, 2, 1)}, "--iterations names 1 more than once"),
        ({"iterations": (1,)}, "--iterations.*at least two"),
        ({"from_": 1, "last": 2}, "--from and --last"),
        ({"last": 2, "window_iterations": 5}, "--last and --window-iterations"),
        ({"window_iterations": 5, "window_tokens": 5}, "--window-iterations and --window-tokens"),
        ({"from_": 5, "to": 4}, "--from 5 must be before --to 4"),
        ({"from_": 5, "to": 5}, "--from 5 must be before --to 5"),
        ({"last": 1}, "--last 1.*at least two"),
        ({"last": 0}, "--last must be at least 1"),
        ({"every": 0}, "--every must be at least 1"),
        ({"window_iterations": -1}, "--window-iterations must be at least 1"),
        ({"window_tokens": 0}, "--window-tokens must be at least 1"),
        ({"to": -1}, "--to must not be negative"),
    ],
)
def test_contradictions_name_the_flags(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Window(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": (1000, 1500)}, "--iterations: .*iteration 1500; the run has 1000, 2000"),
        ({"to": 6000}, "--to: .*iteration 6000; the run has 1000, 2000, 3000, 4000, 5000"),
        ({"from_": 1500}, "--from: .*iteration 1500"),
        ({"from_": 5000}, "only 5000 selected"),
        ({"to": 1000}, "only 1000 selected"),
        ({"last": 6}, "--last 6: the run has"),
        ({"last": 3, "to": 2000}, "--last 3: the run has 1000, 2000 up to there"),
        ({"window_iterations": 999}, "at least two checkpoints: only 5000 selected"),
        ({"every": 7}, "at least two checkpoints: only 5000 selected"),
    ],
)
def test_a_run_without_them(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(RUN, Window(**options))


def test_an_empty_run() -> None:
    with pytest.raises(ValueError, match="no finished checkpoint"):
        select([], Window())


def test_a_long_run_is_not_listed_in_full() -> None:
    with pytest.raises(ValueError, match=r"0, 1, .*, 19, \.\.\., 480, .*499$") as error:
        select([Checkpoint(i) for i in range(500)], Window(to=999))
    assert len(str(error.value)) < 300


def test_unknown_tokens_are_named_only_where_they_matter() -> None:
    run = [Checkpoint(1, None), Checkpoint(2, 20), Checkpoint(3, 30), Checkpoint(4, 40)]
    assert chosen(Window(window_tokens=10), run) == [3, 4]
    with pytest.raises(ValueError, match="--window-tokens: checkpoint of iteration 1 does not say"):
        select(run, Window(window_tokens=20))


def test_positions_are_tokens_only_where_all_are_known_and_increase() -> None:
    assert positions([Checkpoint(1, 10), Checkpoint(2, 30)]) == ((10, 30), "tokens")
    assert positions([Checkpoint(1, 10), Checkpoint(2, None)]) == ((1, 2), "iterations")
    assert positions([Checkpoint(1, 10), Checkpoint(2, 10)]) == ((1, 2), "iterations")
    assert positions([Checkpoint(1, 0), Checkpoint(2, 0)]) == ((1, 2), "iterations")


@given(runs, st.integers(1, 250))
def test_a_window_holds_exactly_those_near_enough(run: list[Checkpoint], length: int) -> None:
    end = max(c.iteration for c in run)
    near = sorted(c.iteration for c in run if end - c.iteration <= length)
    for window in (Window(window_iterations=length), Window(window_tokens=7 * length)):
        if len(near) < 2:
            with pytest.raises(ValueError, match="at least two"):
                select(run, window)
        else:
            assert chosen(window, run) == near


@given(runs, st.data())
def test_any_end_of_a_run(run: list[Checkpoint], data: st.DataObject) -> None:
    iterations = sorted(c.iteration for c in run)
    j = data.draw(st.integers(1, len(run) - 1))
    i = data.draw(st.integers(0, j - 1))
    expected = iterations[i : j + 1]
    assert chosen(Window(from_=iterations[i], to=iterations[j]), run) == expected
    assert chosen(Window(last=len(expected), to=iterations[j]), run) == expected
    assert chosen(Window(iterations=tuple(reversed(expected))), run) == expected


@given(runs, st.integers(1, 20))
def test_thinning_keeps_the_newest_and_even_distances(run: list[Checkpoint], every: int) -> None:
    end = max(c.iteration for c in run)
    kept = sorted(c.iteration for c in run if (end - c.iteration) % every == 0)
    if len(kept) > 1:
        assert chosen(Window(every=every), run) == kept
    else:
        with pytest.raises(ValueError, match="at least two"):
            select(run, Window(every=every))
