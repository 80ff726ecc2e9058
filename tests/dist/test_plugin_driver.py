"""The driver of Megatron-LM's loop, on megatron-core with a stand-in for ``megatron.training``."""

from __future__ import annotations

import json
import os
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tests.mcore import CONFIGS, GPTConfig, RankError, run_ranks
from wsm_megatron import verify
from wsm_megatron.errors import UsageError
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.planning.launch_flags import as_data

CONFIG = CONFIGS["dp2-fully_reshardable"]


class Run:
    """Megatron-LM's loop: a save every 2 iterations, an evaluation every 4."""

    def __init__(
        self, root: Path, train_iters: int = 8, config: GPTConfig = CONFIG, **options: Any
    ) -> None:
        from tests.mcore.bed import build
        from wsm_megatron.plugin.config import WSMConfig
        from wsm_megatron.plugin.driver import Driver
        from wsm_megatron.plugin.megatron_trainer import MegatronTrainer

        self.root, self.training = root, build(config)
        self.args = _arguments(root, train_iters)
        self.log: list[str] = []
        self.disk_is_full = False
        self.stand_in = SimpleNamespace(
            get_timers=lambda: (
                lambda *_, **__: SimpleNamespace(
                    start=lambda **_: self.log.append("timer on"),
                    stop=lambda: self.log.append("timer off"),
                )
            ),
            maybe_finalize_async_save=lambda blocking: None,
            preprocess_common_state_dict=None,
            get_tensorboard_writer=lambda: None,
            get_wandb_writer=lambda: None,
            load_checkpoint=None,
        )
        checkpointing = SimpleNamespace(
            generate_state_dict=dict,
            wandb_utils=SimpleNamespace(on_save_checkpoint_success=None),
            load_checkpoint=self._load,
            check_checkpoint_args=lambda saved: None,
        )
        self.stand_in_checkpointing = checkpointing
        self.started_from, self.seq_lengths, self.began = 0, dict[int, int](), dict[int, int]()
        config = WSMConfig(**options)
        self.trainer = MegatronTrainer(
            training=self.stand_in,  # type: ignore[arg-type]
            checkpointing=checkpointing,  # type: ignore[arg-type]
            save_checkpoint=self._save,
            args=self.args,
            interval=config.interval,
        )
        self.driver = Driver(self.trainer, config)

    def attach(self) -> None:
        self.driver.attach(self.training.model, self.training.optimizer, self.training.scheduler)

    def restart(self, iteration: int) -> None:
        self.started_from = iteration
        built = (self.training.model, self.training.optimizer, self.training.scheduler)
        with self.trainer.checkpoints.watched(self.stand_in):
            self.args.iteration, _ = self.stand_in.load_checkpoint(*built)
        self.log.clear()
        self.attach()

    def train(self) -> None:
        from tests.mcore.bed import train

        while self.training.iteration < self.args.train_iters:
            train(self.training, 1)
            self.args.consumed_train_samples = self.training.consumed_samples
            if self.training.iteration % 4 == 0:
                self.driver.evaluated(self.training.iteration, iter([]), self._evaluate)
            if self.training.iteration % 2 == 0:
                with self.driver.saving(self._progress()):
                    self._save()
            self.driver.stepped(self._progress())
        self.driver.finished(self._progress())

    def _progress(self) -> Any:
        from wsm_megatron.plugin.trainer import Progress

        iteration = self.training.iteration
        return Progress(iteration=iteration, flops=0.0, scheduler=None, data_iterator=None)

    def _evaluate(self, tag: str, data: Any, complete: bool) -> None:
        from tests.mcore.bed import evaluate, mock_data

        self.args.consumed_valid_samples += 8
        loss = evaluate(self.training, mock_data(self.training.config), 1)
        self.log.append(f"{tag}{self.training.iteration} {complete} {loss}")

    def _save(self, *_: Any, **__: Any) -> None:
        from tests.mcore.bed import save_checkpoint

        if self.disk_is_full and self.args.save != str(self.root):
            Path(self.args.save).mkdir(parents=True, exist_ok=True)
            raise OSError(28, "No space left on device")
        save_checkpoint(self.training, self.args.save, save_optim=not self.args.no_save_optim)

    def _load(self, model: Any, optimizer: Any, scheduler: Any) -> tuple[int, float]:
        """As Megatron: a non-persistent checkpoint goes before the one that is asked for."""
        from tests.mcore.bed import load_checkpoint

        steps, iteration = self.training.scheduler.num_steps, self.args.ckpt_step
        if iteration is None or self.args.non_persistent_ckpt_type:
            iteration = self.started_from
        load_checkpoint(self.training, self.args.load, iteration)
        self.stand_in_checkpointing.check_checkpoint_args(self.saved_with(iteration))
        if scheduler is None:
            self.training.scheduler.num_steps = steps
        self.args.consumed_train_samples = self.training.consumed_samples
        self.log.append(f"load {iteration}")
        return self.training.iteration, 0.0

    def saved_with(self, iteration: int) -> Namespace:
        """What the arguments in a checkpoint say."""
        return Namespace(
            seq_length=self.seq_lengths.get(iteration, 16),
            iteration=self.began.get(iteration, 0),
            save_interval=2,
        )


def _arguments(root: Path, train_iters: int) -> Namespace:
    return Namespace(
        save=str(root),
        load=str(root),
        save_interval=2,
        save_retain_interval=None,
        train_iters=train_iters,
        iteration=0,
        eval_iters=1,
        async_save=False,
        no_save_optim=None,
        no_load_optim=None,
        finetune=False,
        ckpt_format="torch_dist",
        ckpt_step=None,
        non_persistent_ckpt_type=None,
        optimizer="adam",
        lr_decay_style="constant",
        global_batch_size=8,
        seq_length=16,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )


def _scenarios(root: Path) -> dict[str, Any]:
    from tests.mcore.bed import build, differences, snapshot, train

    report: dict[str, Any] = {}
    run = Run(root / "a", num=3, decay="1-sqrt", save_interval=4, eval=True)
    run.attach()
    run.train()
    plain = build(CONFIG)
    train(plain, 8)
    report["after"] = differences(snapshot(run.training), snapshot(plain))
    report["log"] = run.log
    report["valid samples"] = run.args.consumed_valid_samples

    again = Run(root / "a", train_iters=10, num=3, save_interval=4)
    (root / "a" / "wsm" / ".iter_0000012.wsm-emit").mkdir(exist_ok=True)
    if dist.get_rank() == 0:
        (root / "a" / "wsm" / "latest_checkpointed_iteration.txt").write_text("4")
    dist.barrier()
    again.restart(8)
    report["refilled"] = [c.iteration for c in again.driver._wsm.kept]
    report["loads"] = again.log
    report["tracker"] = (root / "a" / "wsm" / "latest_checkpointed_iteration.txt").read_text()

    full = Run(root / "b", train_iters=4, num=2)
    full.attach()
    full.disk_is_full = True
    full.train()
    dist.barrier()
    report["full disk"] = sorted(p.name for p in (root / "b" / "wsm").iterdir())

    asked = Run(root / "c", train_iters=8, num=2)
    asked.args.no_save_optim = True
    asked.attach()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    asked.train()
    report["asked for"] = sorted(p.name for p in (root / "c" / "wsm").glob("iter_*"))

    huge = Run(root / "d", num=10**9)
    try:
        huge.attach()
    except ValueError as error:
        report["too large"] = str(error)
    return report


KILLS = ("save", "checksums", "write_tracker")


def _killed(root: Path, moment: str) -> None:
    """Die while the merged checkpoint of iteration 4 is written, unpublished, or untracked."""
    from wsm_megatron.plugin import emit

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    run = Run(root / moment, num=3, save_interval=4)
    run.attach()
    if dist.get_rank() == 0:
        if moment == "save":
            run.driver._save = _dying_save  # type: ignore[method-assign]
        else:
            setattr(emit, moment, die)
    run.train()


def _dying_save(progress: Any, merge: Any, root: Path) -> Path:
    half = root / ".iter_0000004.wsm-emit" / "iter_0000004"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"half a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def _continued(root: Path) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for moment in KILLS:
        run = Run(root / moment, train_iters=6, num=3)
        run.restart(4)
        window = [c.iteration for c in run.driver._wsm.kept]
        tracker = root / moment / "wsm" / "latest_checkpointed_iteration.txt"
        report[moment] = window, tracker.read_text() if tracker.exists() else None
        run.train()
    return report


def test_sigkill_while_a_merged_checkpoint_is_saved(tmp_path: Path) -> None:
    for moment in KILLS:
        with pytest.raises(RankError, match="ended with -9"):
            run_ranks(_killed, 2, tmp_path / "logs", root=tmp_path, moment=moment)
        published = list((tmp_path / moment / "wsm").glob("iter_*"))
        assert len(published) == (moment == "write_tracker")
        for merged in published:
            verify(merged, sources=True)
    first, second = run_ranks(_continued, 2, tmp_path / "logs", root=tmp_path)
    assert first == second
    for moment in KILLS:
        assert first[moment] == ([2, 4], "4" if moment == "write_tracker" else None)
        assert verify(tmp_path / moment / "wsm" / "iter_0000006", sources=True).samples > 0
        assert not list((tmp_path / moment / "wsm").glob(".*"))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("driver")
    first, second = run_ranks(_scenarios, 2, root / "logs", root=root, timeout=200)
    for key in ("after", "refilled", "loads", "tracker", "full disk", "asked for"):
        assert first[key] == second[key], key
    return root, first


def test_training_is_as_without_the_plugin(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["after"] == []


def test_evaluations_come_in_pairs(outcome: tuple[Path, dict[str, Any]]) -> None:
    lines = [line.split() for line in outcome[1]["log"] if "timer" not in line]
    assert [line[:-1] for line in lines] == [
        ["4", "True"],
        ["wsm", "4", "False"],
        ["8", "True"],
        ["wsm", "8", "False"],
    ]
    assert lines[0][-1] != lines[1][-1] and lines[2][-1] != lines[3][-1]
    assert outcome[1]["valid samples"] == 16, "as without the merged evaluations"


def test_merged_checkpoints_verify_against_their_sources(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    root, report = outcome
    assert report["log"].count("timer off") == report["log"].count("timer on") == 2
    for iteration, sources in ((4, [2, 4]), (8, [4, 6, 8])):
        merged = root / "a" / "wsm" / f"iter_{iteration:07d}"
        assert verify(merged, sources=True).samples > 0
        provenance = json.loads((merged / "wsm_merge.json").read_text())
        assert [source["iteration"] for source in provenance["sources"]] == sources
        assert provenance["unit"] == "tokens" and len(provenance["coefficients"]) == len(sources)
        assert provenance["resume"]["launch"] == as_data(check_resume(merged).launches)


def test_a_restart_refills_the_window_and_cleans_up(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    root, report = outcome
    assert report["refilled"] == [4, 6, 8]
    assert report["loads"] == ["load 6", "load 4", "load 8"]
    assert report["tracker"] == "8"
    assert not list((root / "a" / "wsm").glob(".iter_*"))


def test_a_full_disk_costs_a_merged_checkpoint_only(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["full disk"] == []


def test_sigusr2_on_one_rank(outcome: tuple[Path, dict[str, Any]]) -> None:
    """Served at iteration 4, the first with two checkpoints to merge, and not once more."""
    assert outcome[1]["asked for"] == ["iter_0000004", "iter_0000008"]


def test_no_optimizer_state_is_recorded_where_none_is_saved(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    merged = outcome[0] / "c" / "wsm" / "iter_0000008"
    provenance = json.loads((merged / "wsm_merge.json").read_text())
    assert provenance["options"]["optimizer_state"] == "drop"
    assert provenance["resume"]["launch"] == as_data(check_resume(merged).launches)
    assert verify(merged).tensors > 0
    with pytest.raises(UsageError, match="main params, which its own checkpoints do not hold"):
        verify(merged, sources=True)


def test_a_window_that_does_not_fit_is_refused_with_the_figures(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    message = outcome[1]["too large"]
    assert "a window of 1000000000 snapshots needs" in message and "GB of host memory" in message
