"""The plugin's options: refused at start-up, with the flag in the message."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from wsm_megatron.errors import UsageError
from wsm_megatron.plugin.arguments import add_arguments, check_run, config_from_args, merged_root
from wsm_megatron.plugin.config import WSMConfig


def parse(*flags: str) -> WSMConfig | None:
    return config_from_args(add_arguments(argparse.ArgumentParser()).parse_args(flags))


def run_args(**changes: Any) -> argparse.Namespace:
    """Megatron's arguments of a run that the plugin accepts."""
    values: dict[str, Any] = {
        "ckpt_format": "torch_dist",
        "optimizer": "adam",
        "lr_decay_style": "constant",
        "save": "/runs/a",
        "save_interval": 10,
        "save_retain_interval": None,
        "train_iters": 100,
        "train_samples": None,
        "eval_iters": 4,
        "no_save_optim": None,
        "lr_decay_iters": 100,
        "lr_wsd_decay_iters": None,
    }
    return argparse.Namespace(**values | changes)


def test_flags_become_the_config() -> None:
    flags = [
        "--wsm-merge",
        "--wsm-merge-num",
        "8",
        "--wsm-merge-decay",
        "1-sqrt",
        "--wsm-merge-eval",
    ]
    assert parse(*flags) == WSMConfig(num=8, decay="1-sqrt", eval=True)


def test_the_help_names_every_flag_and_its_default() -> None:
    shown = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    for one in WSMConfig.options():
        assert one.flag in shown and one.said_default in shown


def test_no_flag_no_config() -> None:
    assert parse() is None


def test_a_flag_without_the_switch_is_refused() -> None:
    with pytest.raises(ValueError, match="--wsm-merge-num without effect: --wsm-merge is not"):
        parse("--wsm-merge-num", "8")


def test_counts_as_people_write_them(tmp_path: Path) -> None:
    assert parse("--wsm-merge", "--wsm-merge-window-tokens", "2B") == WSMConfig(
        window_tokens=2 * 10**9
    )
    file = tmp_path / "wsm.yaml"
    file.write_text("window_tokens: 1e9\ninterval: 20_000\nstart-iter: 5k\nmin_decay: 10%\n")
    assert parse("--wsm-merge", "--wsm-merge-config", str(file)) == WSMConfig(
        window_tokens=10**9, interval=20_000, start_iter=5000, min_decay=0.1
    )


def test_yaml_sets_what_flags_leave_open(tmp_path: Path) -> None:
    file = tmp_path / "wsm.yaml"
    file.write_text("num: 4\nmin-decay: 0.1\neval: true\n")
    config = parse("--wsm-merge", "--wsm-merge-config", str(file), "--wsm-merge-num", "6")
    assert config == WSMConfig(num=6, min_decay=0.1, eval=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected a mapping"),
        ("number: 4", "there is no option number; did you mean num"),
        ("num: four", "num: 'four' is not a whole number"),
        ("num: 0", "num: must be at least 1, not 0"),
        ("interval: [4, 8]", "interval: must be a whole number, not a list"),
        ("{num: 4, eval: 1}", "eval: '1' is neither true nor false"),
        ("{num: 4, save: s3://b/m}", "save: s3://b/m is an address"),
        ("{num: 4, min_decay: low}", "min_decay: 'low' is not a number"),
        ("{num: 4, store: tape}", "store: 'tape' is not one of memory, disk"),
        ("{num: 4", "expected"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wsm.yaml"
    file.write_text(text)
    with pytest.raises(
        UsageError, match=f"^--wsm-merge-config {re.escape(str(file))}: .*{message}"
    ):
        parse("--wsm-merge", "--wsm-merge-config", str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of --wsm-merge-num"),
        ({"num": 4, "window_iters": 100}, "give exactly one of --wsm-merge-num"),
        ({"num": 1}, "at least two checkpoints"),
        ({"num": 0}, "--wsm-merge-num must be at least 1"),
        ({"num": -2}, "--wsm-merge-num must be at least 1, not -2"),
        ({"num": "4"}, "--wsm-merge-num must be a whole number, not '4'"),
        ({"num": True}, "--wsm-merge-num must be a whole number, not True"),
        ({"num": 4, "start_iter": -1}, "--wsm-merge-start-iter must be at least 0, not -1"),
        ({"num": 4, "eval": 1}, "--wsm-merge-eval must be true or false, not 1"),
        ({"num": 4, "save": 7}, "--wsm-merge-save must be a path, not 7"),
        ({"num": 4, "decay": 2}, "--wsm-merge-decay must be text, not 2"),
        ({"window_iters": 5, "interval": 10}, "shorter than --wsm-merge-interval"),
        ({"num": 4, "decay": "steep"}, "unknown decay 'steep'"),
        ({"num": 4, "min_decay": 1.5}, "must be in \\[0, 1\\]"),
        ({"num": 4, "store": "tape"}, "--wsm-merge-store must be one of memory, disk"),
        ({"num": 4, "dir": "/local"}, "--wsm-merge-dir has no effect"),
        ({"num": 4, "optimizer_state": "all"}, "--wsm-merge-optimizer-state must be one of"),
        ({"num": 4, "half_life": 100}, "or, for a moving average, --wsm-merge-half-life or"),
        ({"half_life": 100, "half_life_tokens": 100}, "--wsm-merge-half-life-tokens, not 2"),
        ({"half_life": 0}, "--wsm-merge-half-life must be at least 1"),
        ({"half_life": 9, "interval": 2}, "--wsm-merge-half-life: .*--wsm-merge-interval without"),
        ({"half_life_tokens": 9, "decay": "mean"}, "half-life-tokens: .*--wsm-merge-decay without"),
        ({"half_life": 9, "min_decay": 0.1}, "--wsm-merge-min-decay without effect"),
        ({"half_life": 9, "store": "disk"}, "--wsm-merge-store disk without effect"),
        ({"half_life": 9, "optimizer_state": "merge"}, "--wsm-merge-optimizer-state merge without"),
        ({"num": 4, "average_every": 0}, "--wsm-merge-average-every must be at least 1, not 0"),
        (
            {"num": 4, "average_every": 4, "interval": 10},
            "--wsm-merge-average-every 4 does not divide --wsm-merge-interval 10 into several",
        ),
        (
            {"num": 4, "average_every": 20, "interval": 10},
            "--wsm-merge-average-every 20 does not divide --wsm-merge-interval 10 into several",
        ),
        (
            {"num": 4, "average_every": 10, "interval": 10},
            "--wsm-merge-interval 10 into several: a block mean would be over the snapshot alone",
        ),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WSMConfig(**options)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"lr_decay_style": "cosine"}, {}, "--lr-decay-style cosine decays the LR"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20},
            {},
            "--lr-decay-style WSD decays the LR",
        ),
        ({"ckpt_format": "fsdp_dtensor"}, {}, "needs --ckpt-format torch_dist"),
        ({"use_megatron_fsdp": True}, {}, r"use-megatron-fsdp.*wsm merge --load"),
        ({"use_torch_fsdp2": True}, {}, r"use-torch-fsdp2.*wsm merge --load"),
        ({"save": None}, {}, "would take no snapshot"),
        ({"save": None}, {"interval": 10}, "the merge would go nowhere"),
        (
            {"save": None},
            {"interval": 10, "eval": True, "optimizer_state": "merge"},
            "--wsm-merge-optimizer-state merge has no effect",
        ),
        ({}, {"save_interval": 15}, "not a multiple of --save-interval 10"),
        ({}, {"save_interval": 15, "interval": 4}, "not a multiple of --wsm-merge-interval 4"),
        ({}, {"start_iter": 100}, "not before the end of training, iteration 100"),
        ({}, {"save": "/runs/a"}, "the run's own --save"),
        ({}, {"num": None, "window_iters": 9}, "holds fewer than two checkpoints"),
        (
            {},
            {"average_every": 3},
            "--wsm-merge-average-every 3 does not divide --save-interval 10",
        ),
        ({}, {"average_every": 10}, "over the snapshot alone"),
        (
            {},
            {"num": None, "half_life": 50, "average_every": 4, "save_interval": 10},
            "--wsm-merge-save-interval 10 is not a multiple of --wsm-merge-average-every 4",
        ),
    ],
)
def test_runs_that_cannot_work_are_refused(
    changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(run_args(**changes), WSMConfig(**{"num": 4} | options))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_precision_aware_optimizer": True, "main_params_dtype": "fp16"},
        {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True},
        {"fp8_param_gather": True, "fp8_recipe": "mxfp8"},
        {"fp4_param_gather": True},
        {"optimizer": "dist_muon"},
        {"optimizer": "sgd"},
    ],
)
def test_every_optimizer_of_the_torch_dist_format_may_run(changes: dict[str, Any]) -> None:
    check_run(run_args(**changes), WSMConfig(num=4))


def test_a_schedule_that_stays_stable_is_fine() -> None:
    stable = {"lr_decay_style": "WSD", "lr_decay_iters": 200, "lr_wsd_decay_iters": 100}
    check_run(run_args(**stable), WSMConfig(num=4))
    check_run(run_args(lr_decay_style="cosine"), WSMConfig(num=4, allow_lr_decay=True))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"save_retain_interval": 50}, {}, "--save-retain-interval 50 deletes checkpoints"),
        ({"eval_iters": 0}, {"eval": True}, "--wsm-merge-eval has no effect"),
        ({"no_save_optim": True}, {}, "--no-save-optim"),
        ({}, {"num": None, "half_life": 50}, "anew, as merged checkpoints come at the end alone"),
        (
            {},
            {"num": None, "half_life": 50, "save_interval": 10, "optimizer_state": "drop"},
            "anew, as merged checkpoints hold no main params",
        ),
        (
            {"no_save_optim": True},
            {"num": None, "half_life": 50, "save_interval": 10},
            "hold no main params (--no-save-optim)",
        ),
    ],
)
def test_surprises_are_warned_about(
    changes: dict[str, Any],
    options: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_run(run_args(**changes), WSMConfig(**{"num": 4} | options))
    assert message in caplog.text


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"save": "{a}/run"}, {}, "--wsm-merge-save .* is the run's own --save"),
        ({"save": "{a}/link"}, {}, "--wsm-merge-save .* is the run's own --save"),
        ({"save": "{a}/../a/run/"}, {}, "--wsm-merge-save .* is the run's own --save"),
        ({"save": "{a}/link"}, {"save": "{a}/other", "load": "{a}/run"}, "the run's own --load"),
        ({}, {"load": "{a}/run/wsm"}, "--wsm-merge-save .* is the run's own --load"),
        ({"save": "{a}/run/non_persistent"}, {}, "--non-persistent-global-ckpt-dir"),
        (
            {"save": "{a}/np"},
            {"non_persistent_global_ckpt_dir": "{a}/np"},
            "--non-persistent-global-ckpt-dir",
        ),
        ({"store": "disk", "dir": "{a}/link"}, {}, "--wsm-merge-dir .* is the run's own --save"),
        (
            {"store": "disk", "dir": "{a}/link/wsm"},
            {},
            "--wsm-merge-dir .* is the run's own --wsm-merge-save",
        ),
    ],
)
def test_nothing_is_written_among_checkpoints_of_the_run(
    tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "a"
    (folder / "run").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "run")

    def placed(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v.format(a=folder) for k, v in values.items()}

    args = run_args(**{"save": str(folder / "run"), **placed(changes)})
    with pytest.raises(ValueError, match=message):
        check_run(args, WSMConfig(num=4, **placed(options)))


def test_how_often_snapshots_and_points_come() -> None:
    windows = [WSMConfig(num=4), WSMConfig(num=4, interval=10, average_every=5)]
    averages = [WSMConfig(half_life=50), WSMConfig(half_life_tokens=50, average_every=5)]
    configs = (*windows, *averages)
    assert [c.snapshot_every for c in configs] == [None, 10, 1, 5]
    assert [c.points_every for c in configs] == [None, 5, None, None]
    for config in averages:
        check_run(run_args(save_interval=None), config)


def test_merged_checkpoints_have_a_root_of_their_own() -> None:
    assert merged_root(run_args(), WSMConfig(num=4)) == Path("/runs/a/wsm")
    assert merged_root(run_args(), WSMConfig(num=4, save="/m")) == Path("/m")
    assert merged_root(run_args(save=None), WSMConfig(num=4)) is None
    with pytest.raises(ValueError, match="--wsm-merge-save s3://b/m is an address"):
        merged_root(run_args(), WSMConfig(num=4, save="s3://b/m"))
    with pytest.raises(ValueError, match="without --wsm-merge-save, --save msc://a is an address"):
        merged_root(run_args(save="msc://a"), WSMConfig(num=4))
