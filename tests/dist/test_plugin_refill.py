"""After a restart the window holds what the run kept, and the run goes on from what it loaded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.dist.test_plugin_driver import Run
from tests.mcore import WRONG_MAINS, GPTConfig, run_ranks
from tests.reference import load_tensors, same_bits
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.optimizer.main_params import check_main_params

ONE_BUCKET = GPTConfig(sharding_type="fully_reshardable", overlap_grad_reduce=True)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the plugin warns of on this rank."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("wsm_megatron").addHandler(handler)
    yield messages
    logging.getLogger("wsm_megatron").removeHandler(handler)


def _restarted(root: Path, iteration: int, **changes: Any) -> dict[str, Any]:
    """Restart a run at an iteration, take up the window, and train two iterations."""
    from tests.mcore.bed import build, differences, load_checkpoint, snapshot, train

    options = {"num": 3, "save_interval": 2} | changes.pop("options", {})
    run = Run(root, train_iters=iteration + 2, **options)
    run.seq_lengths, run.began = changes.pop("seq_lengths", {}), changes.pop("began", {})
    for name, value in changes.items():
        setattr(run.args, name, value)
    with _warnings() as warned:
        run.restart(iteration)
    report: dict[str, Any] = {"window": [c.iteration for c in run.driver._wsm.kept]}
    run.train()
    merge = run.driver._wsm.coefficients()
    assert merge is not None
    plain = build(run.training.config)
    load_checkpoint(plain, root, iteration)
    train(plain, 2)
    report["differs"] = differences(snapshot(run.training), snapshot(plain))
    return report | {"loads": run.log, "warned": warned, "merge": merge}


def _save_again(root: Path, folder: str, saved: str) -> None:
    """Let one checkpoint's folder hold another."""
    if dist.get_rank() == 0:
        shutil.rmtree(root / folder)
        shutil.copytree(root / saved, root / folder)
    dist.barrier()


def _scenarios(root: Path) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name in ("np", "length", "tokens", "unknown", "none", "folder", "branch"):
        first = Run(root / name, train_iters=6, num=3)
        first.attach()
        first.train()
    np = {"non_persistent_ckpt_type": "global"}
    report["non-persistent"] = _restarted(root / "np", 6, **np)
    lengths = {2: 16, 4: 16, 6: 16}
    report["longer"] = _restarted(root / "length", 6, seq_length=64, seq_lengths=lengths)
    few = {"num": None, "window_tokens": 2 * 8 * 64 + 2 * 8 * 16}
    report["tokens"] = _restarted(
        root / "tokens", 6, seq_length=64, seq_lengths=lengths, options=few
    )
    report["mixed"] = _restarted(root / "unknown", 6, seq_lengths={2: 16, 4: 64, 6: 64})
    if dist.get_rank() == 0:
        shutil.rmtree(root / "none" / "iter_0000002")
        shutil.rmtree(root / "none" / "iter_0000004")
        (root / "none" / "iter_0000006" / "metadata.json").rename(root / "none" / "hidden")
    dist.barrier()
    report["nothing finished"] = _nothing_finished(root / "none")
    # Started again from 2, trained to 6 by saves every 4 iterations: iteration 4 is a leftover.
    report["branch"] = _restarted(root / "branch", 6, began={4: 0, 6: 2})
    report["merged"] = _from_merges(root / "branch")
    _save_again(root / "folder", "iter_0000004", "iter_0000002")
    report["another folder"] = _restarted(root / "folder", 6)
    return report


def _stopped_at_5(root: Path, nudge: float, kept: Path) -> None:
    """A run that keeps 2 and 4 on disk, and saves once more because it ends."""
    from tests.mcore.bed import main_params, save_checkpoint, train

    run = Run(root, train_iters=4, num=3, store="disk", dir=str(kept))
    main_params(run.training)[0].data += nudge
    run.attach()
    run.train()
    train(run.training, 1)
    save_checkpoint(run.training, root)


def _disk(root: Path) -> dict[str, Any]:
    """Restarts at 5, which was not kept, with the run's own shards and with another run's."""
    for name, nudge in (("own", 0.0), ("again", 0.0), ("other", 1.0)):
        _stopped_at_5(root / name, nudge, root / f"kept-{name}")
    return {
        kept: _restarted(
            root / run, 5, options={"store": "disk", "dir": str(root / f"kept-{kept}")}
        )
        for run, kept in (("own", "own"), ("again", "other"))
    }


def _nothing_finished(root: Path) -> list[int]:
    run = Run(root, num=3)
    run.args.iteration, run.args.load = 6, str(root)
    run.attach()
    return [c.iteration for c in run.driver._wsm.kept]


def _from_merges(root: Path) -> list[int]:
    """The window of a run that is started from the other's merges."""
    run = Run(root / "wsm", num=3)
    run.args.save = str(root / "onward")
    run.restart(6)
    return [c.iteration for c in run.driver._wsm.kept]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("refill")
    first, second = run_ranks(_scenarios, 2, root / "logs", root=root, timeout=300)
    for name, report in first.items():
        if isinstance(report, dict):
            assert report["window"] == second[name]["window"], name
            assert report["differs"] == second[name]["differs"] == [], name
            assert second[name]["warned"] == [], "the first rank warns for all"
    return first


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("disk")
    first, second = run_ranks(_disk, 2, root / "logs", root=root, timeout=300)
    for name, report in first.items():
        assert report["window"] == second[name]["window"] == [2, 4], name
        assert report["differs"] == second[name]["differs"] == [], name
    return first


def test_kept_files_are_compared_with_a_checkpoint(disk: dict[str, Any]) -> None:
    assert disk["own"]["loads"][:2] == ["load 4", "load 5"] and disk["own"]["warned"] == []


def test_kept_files_of_another_run_are_dropped(disk: dict[str, Any]) -> None:
    assert disk["other"]["loads"][:5] == ["load 4", "load 5", "load 4", "load 2", "load 5"]
    assert "the snapshot of iteration 4 is not what was loaded" in disk["other"]["warned"][0]


def test_exactly_what_is_wanted_is_loaded(reports: dict[str, Any]) -> None:
    """Megatron prefers its newest non-persistent checkpoint, here iteration 6."""
    assert reports["non-persistent"]["window"] == [2, 4, 6]
    assert reports["non-persistent"]["loads"][:3] == ["load 4", "load 2", "load 6"]


def test_a_run_without_a_finished_checkpoint_starts(reports: dict[str, Any]) -> None:
    assert reports["nothing finished"] == []


def test_a_folder_of_another_iteration_is_left_out(reports: dict[str, Any]) -> None:
    assert reports["another folder"]["window"] == [2, 6]
    assert len(reports["another folder"]["warned"]) == 1
    assert "window without iteration 4" in reports["another folder"]["warned"][0]
    assert "its state says iteration 2" in reports["another folder"]["warned"][0]


def test_a_branch_that_was_given_up_is_left_out(reports: dict[str, Any]) -> None:
    assert reports["branch"]["window"] == [2, 6]
    assert len(reports["branch"]["warned"]) == 1
    assert (
        "window without iteration 4: it is of a job that started from iteration 0"
        in (reports["branch"]["warned"][0])
    )


def test_merges_are_not_merged_again(reports: dict[str, Any]) -> None:
    assert reports["merged"] == []


def test_tokens_are_counted_at_the_length_they_were_trained_with(reports: dict[str, Any]) -> None:
    """8 samples an iteration; iterations 7 and 8 are four times as long."""
    merge = reports["longer"]["merge"]
    start = 8 * 4 * 16
    assert merge.iterations == (4, 6, 8) and merge.unit == "tokens"
    assert merge.positions == (start, start + 16 * 16, start + 16 * 16 + 16 * 64)


def test_a_window_in_tokens_is_refilled_as_far_as_it_reaches(reports: dict[str, Any]) -> None:
    assert reports["tokens"]["window"] == [2, 4, 6]
    assert reports["tokens"]["merge"].iterations == (4, 6, 8)


def test_the_length_of_each_checkpoint_is_its_own(reports: dict[str, Any]) -> None:
    merge = reports["mixed"]["merge"]
    assert [b - a for a, b in zip(merge.positions, merge.positions[1:], strict=False)] == [
        16 * 64,
        16 * 16,
    ]


def _padded(root: Path) -> dict[str, Any]:
    from wsm_megatron.plugin import driver

    report: dict[str, Any] = {}
    for name, config in (("buckets", WRONG_MAINS), ("one", ONE_BUCKET)):
        run = Run(root / name, config=config, num=3, save_interval=4)
        with _warnings() as report[f"{name} warned"]:
            run.attach()
            run.train()
    again = Run(root / "buckets", train_iters=10, config=WRONG_MAINS, num=3)
    with _warnings() as report["restart warned"]:
        again.restart(8)
    report["restart"] = [c.iteration for c in again.driver._wsm.kept]
    checked = driver.checked_slices
    driver.checked_slices = lambda optimizer, put_right: checked(optimizer, put_right=False)
    run = Run(root / "refused", config=WRONG_MAINS, num=3)
    with _warnings() as report["refused warned"]:
        run.attach()
        run.train()
    return report


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("padded")
    first, second = run_ranks(_padded, 2, root / "logs", root=root, timeout=300)
    assert first["restart"] == second["restart"]
    if not check_main_params(read_layout(root / "buckets" / "iter_0000008")).wrong:
        pytest.skip("this megatron-core saves several padded buckets right")
    return root, first


def test_main_params_and_moments_are_written_right(padded: tuple[Path, dict[str, Any]]) -> None:
    """As the same run in one bucket writes them."""
    root, report = padded
    for iteration in (4, 8):
        actual = load_tensors(root / "buckets" / "wsm" / f"iter_{iteration:07d}")
        expected = load_tensors(root / "one" / "wsm" / f"iter_{iteration:07d}")
        assert set(actual) == set(expected)
        for key, tensor in expected.items():
            assert same_bits(actual[key], tensor), key
    assert report["one warned"] == []
    assert len(report["buckets warned"]) == 1
    assert "saves 21 tensors of the optimizer wrongly" in report["buckets warned"][0]


def test_what_cannot_be_written_right_is_not_published(
    padded: tuple[Path, dict[str, Any]],
) -> None:
    root, report = padded
    assert not list((root / "refused" / "wsm").iterdir())
    refused = report["refused warned"][-1]
    assert "no merged checkpoint at 8" in refused and "for 7 tensors (decoder." in refused
    assert "--wsm-merge-optimizer-state drop" in refused


def test_the_window_is_not_refilled_from_wrong_main_params(
    padded: tuple[Path, dict[str, Any]],
) -> None:
    _, report = padded
    assert report["restart"] == [8], "what is trained on"
    start, *left_out = report["restart warned"]
    assert "iteration 8, which this run was started from: the main params of" in start
    assert [text.split(": in ")[0] for text in left_out] == [
        f"wsm: window without iteration {i}" for i in (6, 4, 2)
    ]
