"""The window goes on after a restart: found on disk, refilled from checkpoints, or refused."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.mcore import CONFIGS, GPTConfig, RankError, run_ranks

DP2 = CONFIGS["dp2-fully_reshardable"]
TP2 = GPTConfig(tensor_parallel=2, sharding_type="fully_reshardable")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and kept shards of iterations 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("restart")
    run_ranks(_first_run, 2, folder, run=folder)
    return folder


def _wsm(training: Any, kept: Path | None, num: int = 3) -> Any:
    from wsm_megatron.plugin.config import WSMConfig
    from wsm_megatron.plugin.wsm import WSM

    store = "memory" if kept is None else "disk"
    return WSM(training.model, training.optimizer, WSMConfig(num=num, store=store), kept)


def _tokens(training: Any) -> int:
    return training.consumed_samples * training.config.seq_length


def _first_run(run: Path) -> None:
    from tests.mcore.bed import build, save_checkpoint, train

    training = build(DP2)
    wsm = _wsm(training, run / "kept")
    for _ in range(3):
        train(training, 2)
        wsm.snapshot(training.iteration, _tokens(training))
        save_checkpoint(training, run / "run")
    wsm.settle()
    wsm.close()


def _restart(
    run: Path,
    kept: Path | None,
    config: GPTConfig = DP2,
    at: int = 6,
    available: tuple[int, ...] = (),
    nudge: bool = False,
) -> dict[str, Any]:
    """Load iteration ``at``, take up the window, merge."""
    from tests.mcore.bed import build, differences, load_checkpoint, snapshot

    training = build(config)
    load_checkpoint(training, run / "run", at)
    if nudge:
        next(iter(training.optimizer.chained_optimizers)).optimizer.param_groups[0]["params"][
            0
        ].data += 1
    loaded = snapshot(training)
    loads: list[int] = []

    def load(iteration: int) -> int:
        fresh = training.scheduler.num_steps
        load_checkpoint(training, run / "run", iteration)
        training.scheduler.num_steps = fresh  # loading adds the checkpoint's steps
        loads.append(iteration)
        return _tokens(training)

    wsm = _wsm(training, kept)
    try:
        wsm.refill(at, _tokens(training), available, load if available else None)
    except ValueError as error:
        return {"refused": str(error)}
    unchanged = differences(loaded, snapshot(training))
    report = {
        "kept": [(c.iteration, c.tokens) for c in wsm.kept],
        "loads": loads,
        "unchanged": [name for name in unchanged if name != "scheduler"],
    }
    if len(wsm.kept) > 1:
        with wsm.merged():
            report["merged"] = _whole_weights(training)
    wsm.close()
    return report


def _whole_weights(training: Any) -> dict[str, torch.Tensor]:
    """The merged final norm and embedding, whole whatever the layout."""
    from megatron.core import parallel_state

    named = dict(training.model[0].module.module.named_parameters())
    embedding = named["embedding.word_embeddings.weight"].detach().float()
    size = parallel_state.get_tensor_model_parallel_world_size()
    parts = [torch.empty_like(embedding) for _ in range(size)]
    group = parallel_state.get_tensor_model_parallel_group()
    dist.all_gather(parts, embedding, group=group)
    norm = named["decoder.final_layernorm.weight"].detach().float()
    return {"embedding": torch.cat(parts), "norm": norm.clone()}


def _tokens_of(*iterations: int) -> list[tuple[int, int]]:
    return [(i, i * DP2.global_batch_size * DP2.seq_length) for i in iterations]


def _scenarios(run: Path, kept: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """All restarts in the processes of one launch."""
    every = (2, 4, 6)
    return {
        "from disk": _restart(run, kept["disk"]),
        "from memory": _restart(run, None, available=every),
        "earlier": _restart(run, kept["earlier"], at=4),
        "gap": _restart(run, kept["gap"], available=every),
        "another run": _restart(run, kept["another"], nudge=True),
        "other layout": _restart(run, kept["layout"], config=TP2, available=every),
        "other layout, refused": _restart(run, kept["refused"], config=TP2),
        "unreadable": {"error": _unreadable(run, kept["unreadable"])},
    }


def _unreadable(run: Path, kept: Path) -> str:
    """How a restart ends where rank 1 cannot read its folder."""
    from wsm_megatron.plugin.store import DiskStore

    def fail(self: Any) -> None:
        raise OSError(5, "Input/output error")

    found = DiskStore.found
    if dist.get_rank() == 1:
        DiskStore.found = fail  # type: ignore[assignment,method-assign]
    try:
        _restart(run, kept)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        DiskStore.found = found  # type: ignore[method-assign]
    return "no error"


@pytest.fixture(scope="module")
def reports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("restarts")
    names = ("disk", "earlier", "gap", "another", "layout", "refused", "unreadable")
    kept = {name: shutil.copytree(run / "kept", folder / name) for name in names}
    (kept["gap"] / "iter_0000004" / "rank_00001.safetensors").unlink()
    first, second = run_ranks(_scenarios, 2, folder, run=run, kept=kept, timeout=200)
    for name, report in first.items():
        assert report.get("kept") == second[name].get("kept"), name
        assert report.get("unchanged", []) == second[name].get("unchanged", []) == [], name
    errors = [report["unreadable"]["error"] for report in (first, second)]
    return {**first, "folders": kept, "unreadable": errors}


def test_kept_files_are_found_again(reports: dict[str, Any]) -> None:
    assert reports["from disk"]["kept"] == _tokens_of(2, 4, 6)
    assert reports["from disk"]["loads"] == []


def test_memory_is_refilled_from_checkpoints(reports: dict[str, Any]) -> None:
    assert reports["from memory"]["kept"] == _tokens_of(2, 4, 6)
    assert reports["from memory"]["loads"] == [4, 2, 6], "the run's own checkpoint last"


def test_every_way_gives_the_same_merge(reports: dict[str, Any]) -> None:
    expected = reports["from disk"]["merged"]
    for name in ("from memory", "gap", "other layout"):
        for key, tensor in reports[name]["merged"].items():
            assert torch.equal(tensor, expected[key]), (name, key)


def test_what_is_newer_than_the_restart_is_dropped(reports: dict[str, Any]) -> None:
    assert reports["earlier"]["kept"] == _tokens_of(2, 4)
    left = sorted(p.name for p in reports["folders"]["earlier"].iterdir())
    assert left == ["iter_0000002", "iter_0000004"]


def test_a_file_missing_on_one_rank_is_refilled_on_all(reports: dict[str, Any]) -> None:
    assert reports["gap"]["kept"] == _tokens_of(2, 4, 6)
    assert reports["gap"]["loads"] == [4, 6]


def test_shards_of_another_run_are_dropped(reports: dict[str, Any]) -> None:
    assert reports["another run"]["kept"] == []


def test_another_layout_is_refilled_or_refused(reports: dict[str, Any]) -> None:
    assert reports["other layout"]["kept"] == _tokens_of(2, 4, 6)
    assert (
        "[2, 4, 6] were taken under another parallel layout"
        in (reports["other layout, refused"]["refused"])
    )


def test_a_store_that_one_rank_cannot_read_is_an_error_on_all(reports: dict[str, Any]) -> None:
    first, second = reports["unreadable"]
    assert second == "OSError: [Errno 5] Input/output error"
    assert first.startswith("MergeError: looking for snapshots failed on another rank: rank 1")


MOMENTS = ("before", "half", "renamed")


@pytest.fixture(scope="module")
def killed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a SIGKILL leaves that comes while a snapshot of 8 is taken, by its moment."""
    folder = tmp_path_factory.mktemp("killed")
    kept = {moment: Path(shutil.copytree(run / "kept", folder / moment)) for moment in MOMENTS}
    for moment in MOMENTS:
        with pytest.raises(RankError, match="ended with -9"):
            run_ranks(_killed, 2, folder, run=run, kept=kept[moment], moment=moment)
    return kept


def test_a_killed_snapshot_never_counts(run: Path, killed: dict[str, Path], tmp_path: Path) -> None:
    """The restart is at 6, the last checkpoint; iteration 8 has at most one rank's file."""
    for moment, kept in killed.items():
        names = {p.name for p in (kept / "iter_0000008").glob("*.safetensors")}
        assert names == ({"rank_00001.safetensors"} if moment == "renamed" else set())
    for reports in run_ranks(_restarts, 2, tmp_path, run=run, kept=killed):
        for moment, report in reports.items():
            assert report["kept"] == _tokens_of(2, 4, 6), moment
    for kept in killed.values():
        assert not list(kept.glob("*/*.unfinished")) and not (kept / "iter_0000008").exists()


def _restarts(run: Path, kept: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {moment: _restart(run, folder) for moment, folder in kept.items()}


def _killed(run: Path, kept: Path, moment: str) -> None:
    from tests.mcore.bed import build, load_checkpoint, train
    from wsm_megatron.plugin import store

    training = build(DP2)
    load_checkpoint(training, run / "run")
    wsm = _wsm(training, kept)
    wsm.refill(6, _tokens(training))
    train(training, 2)
    if dist.get_rank() == 1:
        _kill_at(store, moment)
    else:
        store.save_file = lambda *_, **__: signal.pause()  # type: ignore[assignment]
    wsm.snapshot(8, _tokens(training))
    wsm.settle()


def _kill_at(store: Any, moment: str) -> None:
    """Let this process die at a chosen moment of a snapshot."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a file")
        die()

    def renamed(source: Path, target: Path) -> None:
        replace(source, target)
        die()

    replace = os.replace
    if moment == "before":
        store.save_file = die
    elif moment == "half":
        store.save_file = half
    else:
        store.os.replace = renamed
