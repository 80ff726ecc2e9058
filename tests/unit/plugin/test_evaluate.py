"""The paired evaluation's recorders and writers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

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
