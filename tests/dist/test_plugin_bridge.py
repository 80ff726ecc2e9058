"""The callback for Megatron-Bridge, on megatron-core with a stand-in for ``megatron.bridge``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tests.mcore import CONFIGS, run_ranks
from wsm_megatron import verify

CONFIG = CONFIGS["dp2-fully_reshardable"]
EVENTS = ("on_train_start", "on_train_step_start", "on_train_end", "on_checkpoint_save")


class Bridge:
    """Bridge's loop: a save every 2 steps, an evaluation every 4; its callbacks in their places."""

    def __init__(
        self, root: Path, steps: int, *, load: Path | None = None, **settings: Any
    ) -> None:
        from tests.mcore.bed import build

        self.training, self.log = build(CONFIG), list[str]()
        train = SimpleNamespace(
            step=0,
            consumed_train_samples=0,
            consumed_valid_samples=0,
            floating_point_operations_so_far=0,
        )
        self.cfg = _configuration(root, steps, load, settings)
        timer = SimpleNamespace(
            start=lambda **_: self.log.append("timer on"), stop=lambda: self.log.append("timer off")
        )
        self.state = SimpleNamespace(
            train_state=train,
            cfg=self.cfg,
            timers=lambda *_, **__: timer,
            tensorboard_logger=None,
            wandb_logger=None,
            _tensorboard_logger=None,
            _wandb_logger=None,
        )
        self.unfinished: list[int] = []
        self.callback: Any = None
        self.checkpointing, self.evaluators = self._modules()
        if load is not None:
            self.load_checkpoint(self.state, None, None, None)

    def _modules(self) -> tuple[Any, list[Any]]:
        names = ("checkpointing", "train", "pretrain")
        modules: list[Any] = [ModuleType(f"megatron.bridge.training.{name}") for name in names]
        checkpointing, *evaluators = modules
        checkpointing.generate_state_dict = dict
        checkpointing.save_checkpoint = self.save_checkpoint
        checkpointing.load_checkpoint = self.load_checkpoint
        checkpointing.maybe_finalize_async_save = lambda *_, blocking: self.finalize()
        checkpointing.wandb_utils = SimpleNamespace(on_save_checkpoint_success=self.log.append)
        for module in evaluators:
            module.evaluate_and_print_results = self.evaluate
        sys.modules |= {module.__name__: module for module in modules}
        return checkpointing, evaluators

    def run(self, callback: Any) -> None:
        from tests.mcore.bed import train

        self.callback, state = callback, self.state.train_state
        self.fire("on_train_start")
        while state.step < self.cfg.train.train_iters:
            self.finalize()
            self.fire("on_train_step_start")
            train(self.training, 1)
            state.step += 1
            state.consumed_train_samples = self.training.consumed_samples
            if state.step % 4 == 0:
                evaluate = self.evaluators[0].evaluate_and_print_results
                evaluate(self.state, f"iteration {state.step}", None, iter([]), None, None)
            if state.step % 2 == 0:
                self.save_checkpoint(self.state)
        self.finalize()
        self.fire("on_train_end")

    def fire(self, event: str) -> None:
        training = self.training
        context = SimpleNamespace(
            state=self.state,
            model=training.model,
            optimizer=training.optimizer,
            scheduler=training.scheduler,
        )
        getattr(self.callback, event)(context)

    def save_checkpoint(self, state: Any, *_: Any, **__: Any) -> None:
        from tests.mcore.bed import save_checkpoint

        settings = self.cfg.checkpoint
        self.checkpointing.wandb_utils.on_save_checkpoint_success(settings.save)
        save_checkpoint(self.training, settings.save)
        step, own = state.train_state.step, settings.save == self.cfg.root
        path = Path(settings.save) / f"iter_{step:07d}"
        if dist.get_rank() == 0:
            self.cfg.to_yaml(str(path / "run_config.yaml"))
            (path / "tokenizer").mkdir()
        if own and settings.async_save:
            (path / "metadata.json").rename(path / "hidden") if dist.get_rank() == 0 else None
            self.unfinished.append(step)
        elif own:
            self.fire("on_checkpoint_save")

    def finalize(self) -> None:
        """Asynchronous saves become durable."""
        while self.unfinished:
            path = Path(self.cfg.root) / f"iter_{self.unfinished.pop(0):07d}"
            if dist.get_rank() == 0:
                (path / "hidden").rename(path / "metadata.json")
            dist.barrier()
            self.fire("on_checkpoint_save")

    def load_checkpoint(self, state: Any, *_: Any, **__: Any) -> None:
        from tests.mcore.bed import load_checkpoint

        root = Path(self.cfg.checkpoint.load)
        step = self.cfg.checkpoint.ckpt_step
        if step is None:
            step = int((root / "latest_checkpointed_iteration.txt").read_text())
        load_checkpoint(self.training, root, step)
        state.train_state.step = step
        state.train_state.consumed_train_samples = self.training.consumed_samples
        self.log.append(f"load {step}")

    def evaluate(self, state: Any, prefix: str, *_: Any, **keywords: Any) -> None:
        from tests.mcore.bed import evaluate, mock_data

        state.train_state.consumed_valid_samples += 8
        loss = evaluate(self.training, mock_data(self.training.config), 1)
        self.log.append(f"{prefix} {loss}")


def _configuration(root: Path, steps: int, load: Path | None, settings: dict[str, Any]) -> Any:
    checkpoint: dict[str, Any] = dict(
        save=str(root),
        save_interval=2,
        save_retain_interval=None,
        load=None if load is None else str(load),
        ckpt_step=None,
        ckpt_format="torch_dist",
        non_persistent_ckpt_type=None,
        non_persistent_global_ckpt_dir=None,
        non_persistent_local_ckpt_dir=None,
        pretrained_checkpoint=None,
        async_save=False,
        save_optim=True,
        load_optim=True,
        finetune=False,
        most_recent_k=-1,
    )

    def to_yaml(path: str) -> None:
        saved = f"checkpoint: {{save_interval: 2, save: {checkpoint['save']}}}"
        Path(path).write_text(f"model: {{seq_length: 16}}\n{saved}")

    return SimpleNamespace(
        root=str(root),
        checkpoint=SimpleNamespace(**checkpoint | settings),
        train=SimpleNamespace(train_iters=steps, global_batch_size=8),
        validation=SimpleNamespace(eval_iters=1),
        scheduler=SimpleNamespace(lr_decay_style="constant"),
        optimizer=SimpleNamespace(optimizer="adam"),
        ddp=SimpleNamespace(),
        model=SimpleNamespace(seq_length=16),
        to_yaml=to_yaml,
    )


def _scenarios(root: Path) -> dict[str, Any]:
    from tests.mcore.bed import build, differences, snapshot, train
    from wsm_megatron.plugin.bridge import WSMCallback

    run = Bridge(root / "a", 8)
    run.run(WSMCallback(num=3, decay="1-sqrt", save_interval=4, eval=True))
    plain = build(CONFIG)
    train(plain, 8)
    report: dict[str, Any] = {"after": differences(snapshot(run.training), snapshot(plain))}
    report["log"] = run.log
    report["valid samples"] = run.state.train_state.consumed_valid_samples

    again = Bridge(root / "a", 10, load=root / "a")
    callback = WSMCallback(num=3)
    again.callback = callback
    again.fire("on_train_start")
    report["refilled"] = [c.iteration for c in callback._driver._wsm.kept]
    report["loads"] = again.log
    report["train state"] = again.state.train_state.step

    late = Bridge(root / "b", 8, async_save=True)
    late.run(WSMCallback(num=3, save_interval=4, eval=True))
    report["awaited"] = [line.rsplit(" ", 1)[0] for line in late.log if "iteration" in line]

    other = Bridge(root / "c", 4)
    other.run(WSMCallback(num=2, eval=True))
    stranger = SimpleNamespace(train_state=SimpleNamespace(consumed_valid_samples=0))
    before = len(other.log)
    other.evaluators[1].evaluate_and_print_results(stranger, "another run", None, iter([]), None)
    report["another run"] = len(other.log) - before
    return report


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("bridge")
    first, second = run_ranks(_scenarios, 2, root / "logs", root=root, timeout=200)
    for key in ("after", "refilled", "loads", "awaited"):
        assert first[key] == second[key], key
    return root, first


def test_training_is_as_without_the_callback(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["after"] == []
    assert outcome[1]["valid samples"] == 16, "as without the merged evaluations"


def test_evaluations_come_in_pairs(outcome: tuple[Path, dict[str, Any]]) -> None:
    lines = [line.rsplit(" ", 1)[0] for line in outcome[1]["log"] if "iteration" in line]
    assert lines == ["iteration 4", "wsm iteration 4", "iteration 8", "wsm iteration 8"]


def test_merged_checkpoints_verify_and_are_told_to_no_tracker(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    root, report = outcome
    for iteration in (4, 8):
        merged = root / "a" / "wsm" / f"iter_{iteration:07d}"
        assert verify(merged, sources=True).samples > 0
        assert f"save: {root / 'a'}}}" in (merged / "run_config.yaml").read_text()
    assert (root / "a" / "wsm" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert [line for line in report["log"] if "/" in line] == [str(root / "a")] * 4
    assert report["log"].count("timer off") == report["log"].count("timer on") == 2


def test_a_restart_refills_the_window(outcome: tuple[Path, dict[str, Any]]) -> None:
    report = outcome[1]
    assert report["refilled"] == [4, 6, 8]
    assert report["loads"] == ["load 8", "load 6", "load 4", "load 8"]
    assert report["train state"] == 8


def test_an_asynchronous_save_counts_once_it_is_durable(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    """At the evaluation of iteration 4 only iteration 2 was; the merge of 4 waits for its save."""
    root, report = outcome
    assert report["awaited"] == ["iteration 4", "iteration 8", "wsm iteration 8"]
    for iteration in (4, 8):
        assert verify(root / "b" / "wsm" / f"iter_{iteration:07d}", sources=True).samples > 0


def test_another_run_of_the_process_is_evaluated_as_ever(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    assert outcome[1]["another run"] == 1
