"""What goes wrong on one rank: every rank leaves it out or raises, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.mcore import CONFIGS, run_ranks
from tests.reference import rounded, same_bits, weighted_sum64


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faults")
    return run_ranks(_all_faults, 2, folder, kept=folder / "kept", timeout=200)


def _all_faults(kept: Path) -> dict[str, Any]:
    """One run through every fault, then compared with a run without the plugin."""
    from tests.mcore.bed import build, differences, snapshot, train
    from wsm_megatron.plugin.config import WSMConfig
    from wsm_megatron.plugin.wsm import WSM

    report: dict[str, Any] = {}
    config = CONFIGS["dp2"]
    training = build(config)
    options = {"num": 3, "store": "disk", "optimizer_state": "merge"}
    wsm = WSM(training.model, training.optimizer, WSMConfig(**options), kept)
    report["too few"] = _message(wsm, lambda: None)
    for fault in (_none, _none, _disk_full, _nan, _none):
        train(training, 1)
        fault(wsm, training)
    report["kept"] = [c.iteration for c in wsm.kept]
    before = snapshot(training)
    report["merge fails"] = _message(wsm, lambda: None, broken_rank=1)
    report["block fails"] = _message(wsm, _raise_on_rank_1)
    report["restored"] = differences(before, snapshot(training))
    report["moments"] = _moments_are_merged(wsm, training)
    report["restored again"] = differences(before, snapshot(training))

    wsm.snapshot(6, 6, durable=False)
    wsm.settle()
    report["not durable"] = [c.iteration for c in wsm.kept]
    wsm.confirm(6)
    wsm.settle()
    report["durable"] = [c.iteration for c in wsm.kept]
    dist.barrier()  # each rank removes its own files
    report["files"] = sorted(p.name for p in kept.iterdir())
    train(training, 1)
    wsm.close()
    plain = build(config)
    train(plain, 6)
    report["after"] = differences(snapshot(training), snapshot(plain))
    return report


def _snapshot(wsm: Any, training: Any) -> None:
    wsm.snapshot(training.iteration, 100 * training.iteration)
    wsm.settle()


_none = _snapshot


def _disk_full(wsm: Any, training: Any) -> None:
    """Only rank 1 cannot write."""
    from wsm_megatron.plugin import store

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save_file = store.save_file
    if dist.get_rank() == 1:
        store.save_file = full  # type: ignore[assignment]
    _snapshot(wsm, training)
    store.save_file = save_file


def _nan(wsm: Any, training: Any) -> None:
    """Only rank 0 has one, while it is copied."""
    from wsm_megatron.plugin.optimizers import parts

    main = next(parts(training.optimizer)[0].main_params()).stepped
    saved = main.detach().clone()
    if dist.get_rank() == 0:
        main.data[0] = float("nan")
    _snapshot(wsm, training)
    main.data.copy_(saved)


def _message(wsm: Any, block: Any, broken_rank: int | None = None) -> str:
    """How ``merged()`` ends on this rank."""

    def unreadable(*_: Any) -> None:
        raise OSError("cannot read back")

    get = wsm._store.get
    if dist.get_rank() == broken_rank:
        wsm._store.get = unreadable
    try:
        with wsm.merged():
            block()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        wsm._store.get = get
    return "no error"


def _raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("lost the data loader")


def _moments_are_merged(wsm: Any, training: Any) -> bool:
    with wsm.merged() as merge:
        for index, shard in enumerate(wsm._shards):
            sources = [wsm._store.get(i, index) for i in merge.iterations]
            total = weighted_sum64(merge.coefficients, sources)
            if not same_bits(shard.owned(), rounded(total, torch.float32)):
                return False
    kinds = {shard.name.split(".")[0] for shard in wsm._shards}
    return kinds == {"main", "exp_avg", "exp_avg_sq"}


def test_a_merge_needs_two_snapshots(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert "MergeError: a merge needs at least two snapshots" in report["too few"]


def test_a_snapshot_that_fails_on_one_rank_is_left_out_on_all(
    reports: list[dict[str, Any]],
) -> None:
    for report in reports:
        assert report["kept"] == [1, 2, 5]


def test_a_merge_that_fails_on_one_rank_raises_on_all(reports: list[dict[str, Any]]) -> None:
    first, second = (report["merge fails"] for report in reports)
    assert second == "OSError: cannot read back"
    assert first == "MergeError: the merge failed on another rank: rank 1: " + second


def test_a_block_left_by_one_rank_raises_on_all(reports: list[dict[str, Any]]) -> None:
    first, second = (report["block fails"] for report in reports)
    assert second == "RuntimeError: lost the data loader"
    assert first.startswith("MergeError: work on the merged weights failed on another rank: rank 1")


def test_weights_are_restored_after_failures(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["restored"] == [] and report["restored again"] == []
        assert report["after"] == []


def test_moments_merge_where_that_is_asked_for(reports: list[dict[str, Any]]) -> None:
    assert all(report["moments"] for report in reports)


def test_an_asynchronous_save_counts_once_durable(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["not durable"] == [1, 2, 5]
        assert report["durable"] == [2, 5, 6]
        assert report["files"] == ["iter_0000002", "iter_0000005", "iter_0000006"]
