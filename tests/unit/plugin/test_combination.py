"""Several merges of one window: their names, what each holds, which are emitted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.plugin.test_config import parse, run_args
from wsm_megatron import MergeConfig, Sweep, SweepGrid
from wsm_megatron.errors import UsageError
from wsm_megatron.plugin.arguments import add_arguments, check_run, merged_roots
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint, Window, select

SEVERAL: dict[str, Any] = {"decay": ("1-sqrt", "mean"), "num": (4, 8), "eval": True}


def names(config: WSMConfig) -> list[str]:
    return [one.name for one in config.combinations]


def test_flags_take_lists() -> None:
    flags = "--wsm-merge --wsm-merge-decay 1-sqrt,mean --wsm-merge-num 4,8,16 --wsm-merge-eval"
    config = parse(*flags.split())
    assert config == WSMConfig(decay=("1-sqrt", "mean"), num=(4, 8, 16), eval=True)
    assert names(config) == [f"{d}-last{n}" for n in (4, 8, 16) for d in ("1-sqrt", "mean")]
    assert config.reach.length == 16, "the longest is kept"
    tokens = parse("--wsm-merge", "--wsm-merge-window-tokens", "1B,2B", "--wsm-merge-eval")
    assert tokens is not None and tokens.window_tokens == (10**9, 2 * 10**9)


def test_a_file_takes_lists(tmp_path: Path) -> None:
    file = tmp_path / "wsm.yaml"
    file.write_text("decay: [1-sqrt, mean]\nwindow_iters: [2k, 4k]\nemit: [mean:4k]\neval: true\n")
    config = parse("--wsm-merge", "--wsm-merge-config", str(file))
    assert config is not None and config.window_iters == (2000, 4000)
    assert [one.name for one in config.emitted] == ["mean-4000-iterations"]


@pytest.mark.parametrize(
    ("lengths", "swept"),
    [
        ({"num": (4, 8)}, {"last": (4, 8)}),
        ({"window_iters": (40, 80)}, {"window_iterations": (40, 80)}),
        ({"window_tokens": (10**9, 10**10)}, {"window_tokens": (10**9, 10**10)}),
    ],
)
def test_a_merge_has_the_name_that_a_sweep_gives_it(
    lengths: dict[str, Any], swept: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "steep.csv").write_text("0,1\n1,0\n")
    how: dict[str, Any] = {"decay": ("ema", str(tmp_path / "steep.csv"))}
    config = WSMConfig(**how, **lengths, min_decay=0.1, eval=True)
    grid = SweepGrid(**how, **swept, min_decay=0.1)
    merges = Sweep(MergeConfig(load="run", save="out"), grid).merge_set().merges
    assert names(config) == [one.save.name for one in merges]
    assert "ema-floor0.1-" in names(config)[0] and names(config)[1].startswith("steep-floor0.1-")


@given(
    iterations=st.sets(st.integers(1, 60), min_size=2),
    length=st.integers(2, 70),
    kind=st.sampled_from(["num", "window_iters", "window_tokens"]),
)
def test_a_merge_holds_what_an_offline_merge_selects(
    iterations: set[int], length: int, kind: str
) -> None:
    kept = tuple(Checkpoint(i, 10 * i) for i in sorted(iterations))
    length *= 10 if kind == "window_tokens" else 1
    (one,) = WSMConfig(**{kind: length}, decay="1-sqrt").combinations  # type: ignore[arg-type]
    offline = {"num": "last", "window_iters": "window_iterations"}.get(kind, kind)
    if kind == "num":
        length = min(length, len(kept))  # until it is full, a window is what there is
    try:
        selected = select(kept, Window(**{offline: length}))
    except UsageError:  # fewer than two
        assert one.over(kept) is None
    else:
        assert one.over(kept) == MergeCoefficients.over(selected, "1-sqrt")


def test_the_first_is_emitted_and_any_may_be() -> None:
    def emitted(**options: Any) -> list[str]:
        return [one.name for one in WSMConfig(**SEVERAL, **options).emitted]

    assert emitted() == ["1-sqrt-last4"]
    assert emitted(emit="mean:8") == ["mean-last8"]
    assert emitted(emit=("mean:8", "1-sqrt:4")) == ["mean-last8", "1-sqrt-last4"]
    assert emitted(emit="all") == ["1-sqrt-last4", "mean-last4", "1-sqrt-last8", "mean-last8"]
    tokens = WSMConfig(window_tokens=(10**9, 2 * 10**9), emit="linear:2B", eval=True)
    assert [one.reach.length for one in tokens.emitted] == [2 * 10**9]


def test_several_have_a_root_each_and_one_has_the_whole() -> None:
    def roots(**options: Any) -> list[Path]:
        return list(merged_roots(run_args(), WSMConfig(**SEVERAL, **options)).values())

    assert roots() == roots(emit="mean:4") == [Path("/runs/a/wsm")]
    wanted = [Path("/m/1-sqrt-last4"), Path("/m/mean-last8")]
    assert roots(emit=("1-sqrt:4", "mean:8"), save="/m") == wanted
    assert merged_roots(run_args(save=None), WSMConfig(**SEVERAL)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": ()}, "^--wsm-merge-num has no value"),
        ({"decay": (), "num": 4}, "^--wsm-merge-decay has no value"),
        ({"num": (4, 8, 4)}, "^--wsm-merge-num names a value twice: 4, 8, 4"),
        ({"num": 4, "decay": ("mean", "mean")}, "^--wsm-merge-decay names a value twice"),
        ({"num": (4, 0)}, "^--wsm-merge-num must be at least 1, not 0"),
        ({"num": (4, 1)}, "^--wsm-merge-num 1: a merge needs at least two"),
        ({"num": (4, "8")}, "^--wsm-merge-num must be a whole number, not '8'"),
        ({"num": 4, "decay": ("mean", "steep")}, "^--wsm-merge-decay: unknown decay 'steep'"),
        ({"num": 4, "min_decay": 2.0}, "^--wsm-merge-min-decay: "),
        ({"window_iters": (40, 5), "interval": 10}, "^--wsm-merge-window-iters 5 is shorter"),
        ({"num": (4, 8), "window_iters": 9}, "give exactly one of --wsm-merge-num"),
        ({"num": 4, "emit": "1-sqrt:4"}, "^--wsm-merge-emit 1-sqrt:4: .* are linear:4; or all"),
        ({"num": 4, "emit": "linear"}, "^--wsm-merge-emit linear: "),
        ({"num": 4, "emit": "linear:"}, "^--wsm-merge-emit linear:: "),
        ({"num": 4, "emit": "linear:four"}, "^--wsm-merge-emit: 'four' is not a whole number"),
        ({"num": 4, "emit": ("linear:4", "linear:4.0")}, "^--wsm-merge-emit names a merge twice"),
        ({"num": 4, "emit": ("all", "linear:4")}, "^--wsm-merge-emit all: "),
        ({"num": (4, 8), "eval": False}, "^linear:8 would be neither evaluated nor emitted"),
    ],
)
def test_bad_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WSMConfig(**{"eval": True} | options)


def test_curves_of_one_name_are_refused(tmp_path: Path) -> None:
    curves = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        curves.append(str(tmp_path / folder / "steep.csv"))
        Path(curves[-1]).write_text("0,1\n1,0\n")
    with pytest.raises(UsageError, match="--wsm-merge-decay: two .* one name, steep-last4"):
        WSMConfig(num=4, decay=tuple(curves), eval=True)


def test_an_empty_list_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    parser = add_arguments(argparse.ArgumentParser())
    for flags in ("--wsm-merge-num=", "--wsm-merge-num=4,,8", "--wsm-merge-decay="):
        with pytest.raises(SystemExit):
            parser.parse_args(["--wsm-merge", flags])
        assert flags.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"num": (4, 11)}, {}, r"--wsm-merge-num 11 is never reached: .* takes 10 snapshots"),
        ({"num": (4, 8), "start_iter": 31}, {}, "--wsm-merge-num 8 .* takes 7 snapshots"),
        ({"num": (4, 11)}, {"train_iters": 99}, "--wsm-merge-num 11 .* takes 10 snapshots"),
        ({"window_iters": (40, 9)}, {}, "--wsm-merge-window-iters 9 holds fewer than two"),
        (
            {"window_tokens": (9000, 999)},
            {"global_batch_size": 10, "seq_length": 10},
            "--wsm-merge-window-tokens 999 holds fewer than two .* 1000 tokens",
        ),
        (
            {"num": 4, "interval": 10, "emit": "linear:4"},
            {"save": None},
            "--wsm-merge-emit has no effect",
        ),
        ({"num": (2, 3), "emit": "all"}, {"load": "/runs/a/wsm/linear-last3"}, "own --load"),
    ],
)
def test_windows_that_the_run_cannot_give_are_refused(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_run(run_args(**changes), WSMConfig(**{"eval": True} | options))


def test_windows_that_the_run_just_fills_are_taken() -> None:
    check_run(run_args(), WSMConfig(num=(4, 10), eval=True))
    check_run(run_args(train_iters=95), WSMConfig(num=(4, 10), eval=True))
    check_run(run_args(), WSMConfig(num=(4, 7), start_iter=40, eval=True))
    check_run(run_args(), WSMConfig(num=11))  # one window may always be longer than the run


def test_names_of_merges_that_are_no_sweep_s() -> None:
    """Means and moving averages are not what ``wsm sweep`` makes of the same checkpoints."""
    (means,) = WSMConfig(num=8, decay="ema", average_every=10, interval=100).combinations
    assert means.name == "ema-last8-means10"
    (average,) = WSMConfig(half_life=1000).combinations
    assert average.name == "half-life1000" and average.reach.size(1, None) == 1


@pytest.mark.parametrize("flags", [{"emit": "linear:1000"}, {"dry_run": True}])
def test_a_moving_average_is_one_merge(flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--wsm-merge-half-life: a moving average has no window"):
        WSMConfig(half_life=1000, **flags)
