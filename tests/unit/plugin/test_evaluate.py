"""The paired evaluation's recorders and writers."""

from __future__ import annotations

from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch

from wsm_megatron.plugin.bridge_trainer import BridgeTrainer
from wsm_megatron.plugin.evaluate import record, replay
from wsm_megatron.plugin.megatron_trainer import MegatronTrainer


def batches(number: int) -> Any:
    for index in range(number):
        mask = torch.ones(2, 2, dtype=torch.bool).tril()
        yield {"tokens": torch.full((3,), index), "attention_mask": mask}


def test_the_same_batches_come_again() -> None:
    recorder = record(batches(5))
    seen = [next(recorder)["tokens"] for _ in range(3)]
    again = [batch["tokens"] for batch in replay(recorder)]
    assert torch.equal(torch.stack(seen), torch.stack(again))


def test_masks_that_repeat_are_remembered_once() -> None:
    recorder = record(batches(3))
    list(recorder)
    remembered = [batch["attention_mask"] for batch in replay(recorder)]
    assert remembered[0] is remembered[1] is remembered[2]


def test_every_shape_of_iterators() -> None:
    assert replay(record(None)) is None
    recorded = record([batches(1), None])
    next(recorded[0])
    first, second = replay(recorded)
    assert second is None and len(list(first)) == 1


def test_writers_say_wsm_within_and_not_after() -> None:
    written: list[Any] = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

        def log(self, values: dict[str, float], step: int) -> None:
            written.append((values, step))

    writer = Writer()
    training = SimpleNamespace(
        get_tensorboard_writer=lambda: writer, get_wandb_writer=lambda: writer
    )
    with _trainer(training).evaluating_merge(["wsm"]):
        training.get_tensorboard_writer().add_scalar("lm loss validation", 2.0, 8)
        training.get_wandb_writer().log({"lm loss validation": 2.0}, 8)
    assert written == [("wsm lm loss validation", 2.0, 8), ({"wsm lm loss validation": 2.0}, 8)]
    assert training.get_tensorboard_writer() is writer


class Writer:
    """Of any kind; what is written is kept."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append(({tag: value}, step))

    def log(self, values: dict[str, float], step: int) -> None:
        self.written.append((values, step))

    log_metrics = log


def test_every_writer_of_bridge_has_the_curves_of_a_merge_to_themselves() -> None:
    kinds = ("tensorboard_logger", "wandb_logger", "mlflow_logger", "comet_logger")
    writers = {kind: Writer() for kind in kinds}
    state: Any = type("State", (), {kind: property(attrgetter(f"_{kind}")) for kind in kinds})()
    vars(state).update({f"_{kind}": writer for kind, writer in writers.items()})
    state.train_state = SimpleNamespace(step=0, consumed_valid_samples=16)
    trainer = BridgeTrainer.__new__(BridgeTrainer)
    trainer._state = state
    with trainer.evaluating_merge(["wsm a", "wsm b"]):
        state.tensorboard_logger.add_scalar("loss", 2.0, 8)
        state.mlflow_logger.log_metrics({"loss": 2.0}, step=8)
        trainer.write_scalars({"violation": 1.0}, 8)
    trainer.write_scalars({"violation": 0.5}, 8)
    both = {"wsm a violation": 1.0, "wsm b violation": 1.0}, 8
    assert writers["wandb_logger"].written == [both, ({"violation": 0.5}, 8)]
    assert writers["comet_logger"].written == [both, ({"violation": 0.5}, 8)]
    assert writers["mlflow_logger"].written[0] == ({"wsm a loss": 2.0, "wsm b loss": 2.0}, 8)
    assert [tag for values, _ in writers["tensorboard_logger"].written for tag in values] == [
        "wsm a loss",
        "wsm b loss",
        "wsm a violation",
        "wsm b violation",
        "violation",
    ]


def test_no_writer_stays_no_writer() -> None:
    training = SimpleNamespace(get_tensorboard_writer=lambda: None, get_wandb_writer=lambda: None)
    with _trainer(training).evaluating_merge(["wsm"]):
        assert training.get_tensorboard_writer() is None


def test_samples_of_merged_weights_are_not_counted() -> None:
    training = SimpleNamespace(get_tensorboard_writer=lambda: None, get_wandb_writer=lambda: None)
    trainer = _trainer(training)
    with trainer.evaluating_merge(["wsm"]):
        trainer.args.consumed_valid_samples += 8
    assert trainer.args.consumed_valid_samples == 16


def _trainer(training: Any) -> MegatronTrainer:
    return MegatronTrainer(
        training=training,
        checkpointing=SimpleNamespace(),  # type: ignore[arg-type]
        save_checkpoint=lambda: None,
        args=SimpleNamespace(consumed_valid_samples=16),
        interval=None,
    )
