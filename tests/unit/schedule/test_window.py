"""Selecting checkpoints of a run and their positions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.schedule.decay import coefficients
from wsm_megatron.schedule.window import (
    Checkpoint,
    Consumed,
    Window,
    count_tokens,
    positions,
    select,
    why_iterations,
)

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
        ({"every": 2000, "last": 3}, [1000, 3000, 5000]),
        ({"every": 2000, "last": 2, "to": 4000}, [2000, 4000]),
        ({"min_interval": 1500, "last": 2}, [3000, 5000]),
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
        ({"last": 4, "every": 2000}, "--last 4 --every 2000: the run has 1000, 3000, 5000 up to"),
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


def counted(*run: tuple[int | None, ...]) -> list[int | None]:
    return [c.tokens for c in count_tokens([Consumed(*one) for one in run])]


def test_tokens_are_summed_at_the_length_of_each_interval() -> None:
    """A context extension after iteration 20: 1000 samples an interval, 64 tokens, then 512."""
    run = [Consumed(i, 100 * i, s) for i, s in ((10, 64), (20, 64), (30, 512), (40, 512))]
    tokens, unit = positions(count_tokens(run))
    assert (tokens, unit) == ((64_000, 128_000, 640_000, 1_152_000), "tokens")
    expected = pytest.approx([0.0441, 0.3529, 0.3529, 0.25], abs=5e-5)
    assert list(coefficients(tokens, "linear")) == expected
    assert counted((10, 1000, 512), (20, 2000, 512), (30, 3000, 64)) == [
        512_000,
        1_024_000,
        1_088_000,
    ]


def test_tokens_of_a_run_of_one_length_are_samples_x_length() -> None:
    """Also with a batch-size ramp-up, whose iterations differ in samples."""
    assert counted((10, 80, 16), (20, 240, 16), (30, 560, 16)) == [1280, 3840, 8960]


def test_a_checkpoint_that_does_not_say_its_samples_is_passed_over() -> None:
    assert counted((1, 10, 4), (2, None, 4), (3, 30, None), (4, 40, 4)) == [40, None, None, 160]


def test_a_change_of_length_must_be_at_a_checkpoint_to_be_counted() -> None:
    """The job that saved 40 had started from 30, 30 or 20: only there the length can change."""
    assert counted((20, 2000, 64, 0), (40, 4000, 512, 20)) == [128_000, 128_000 + 2000 * 512]
    assert counted((30, 3000, 64, 0), (40, 4000, 512, 30))[0] == 192_000
    run = [Consumed(10, 1000, 64, 0), Consumed(20, 2000, 64, 0), Consumed(40, 4000, 512, 30)]
    found = count_tokens([*run, Consumed(50, 5000, 512, 30)])
    assert [c.tokens for c in found] == [None, None, 4000 * 512, 5000 * 512]
    assert positions(found) == ((10, 20, 40, 50), "iterations")
    reason = why_iterations(found)
    assert reason is not None and "from 64 to 512 between iterations 20 and 40" in reason
    assert "started from iteration 30" in reason
    # Some write the checkpoint's own iteration there: that says nothing of the start.
    assert counted((20, 2000, 64, 20), (40, 4000, 512, 40))[0] == 128_000


@pytest.mark.parametrize("samples", [500, 2000])
def test_samples_that_go_backwards_or_repeat_are_no_tokens(samples: int) -> None:
    """Not even between checkpoints of which the later one has more of them."""
    run = [(10, 1000, 64), (20, 2000, 64), (30, samples, 64), (40, samples + 1500, 64)]
    found = count_tokens([Consumed(*one) for one in run])
    assert positions([found[0], found[3]]) == ((10, 40), "iterations")
    assert why_iterations(found) == (
        f"consumed samples do not increase from iteration 20 (2,000) to 30 ({samples:,})"
    )
    assert positions(found[2:])[1] == "tokens"
    with pytest.raises(ValueError, match="--window-tokens: consumed samples do not increase"):
        select(found, Window(window_tokens=10**9))


def test_why_positions_are_in_iterations() -> None:
    assert why_iterations([Checkpoint(1, 10), Checkpoint(2, 30)]) is None
    assert why_iterations([Checkpoint(1, 10), Checkpoint(2)]) == (
        "checkpoint of iteration 2 does not say how many tokens it has seen"
    )
    assert why_iterations([Checkpoint(1, 10), Checkpoint(2, 10)]) == (
        "tokens do not increase from iteration 1 (10) to 2 (10)"
    )


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from([16, 64, 512])), min_size=2))
def test_distances_are_what_was_trained_between(steps: list[tuple[int, int]]) -> None:
    run, samples = [], 0
    for i, (batch, length) in enumerate(steps):
        samples += batch
        run.append(Consumed(i, samples, length))
    tokens = [c.tokens or 0 for c in count_tokens(run)]
    trained = [b - a for a, b in pairwise(tokens)]
    assert trained == [batch * length for batch, length in steps[1:]]


def test_tokens_can_stand_for_what_was_consumed():
    assert Consumed.of(4, 100) == Consumed(4, 100, 1)
    assert Consumed.of(4, Consumed(4, 10, 16, 0)) == Consumed(4, 10, 16, 0)
