"""The trainings that a rank keeps, their weights, and their held-out losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from examples.cpu_ranks import GPTConfig
from examples.cpu_ranks.training import Training, build, evaluate, lr_scheduler
from examples.wsm_vs_wsd.profile import Profile
from examples.wsm_vs_wsd.text import held_out_data
from wsm_megatron.plugin.load_balance import ExpertLoads

SPLITS = ("validation", "test")


class Bench:
    """Trainings are built once for each shape and LR and used again: an arm loads all state."""

    def __init__(self, profile: Profile):
        self.profile = profile
        self._built: dict[GPTConfig, Training] = {}

    def fresh(self, config: GPTConfig) -> Training:
        """New weights, no optimizer state."""
        self._built[_shape(config)] = training = build(config)
        return training

    def used(self, config: GPTConfig) -> Training:
        """Any weights and optimizer state: for an arm that loads both."""
        if (training := self._built.get(_shape(config))) is None:
            return self.fresh(config)
        training.config = config
        training.scheduler = lr_scheduler(config, training.optimizer)
        training.losses = []
        return training

    def losses(self, training: Training, splits: tuple[str, ...] = SPLITS) -> dict[str, float]:
        """Nats a byte by split, and the load balance of a MoE on the last split."""
        found: dict[str, float] = {}
        loads = ExpertLoads(training.model)
        for split in splits:
            data = held_out_data(split, self.profile.seq_length)
            with loads.counting():
                loss = evaluate(training, data, self.profile.batches)
            assert loss is not None, "no pipeline stages here"
            found[split] = loss
        if (balance := loads.balance()) is not None:
            found |= {
                "max_violation": balance.max_violation,
                "min_violation": balance.min_violation,
            }
        for chunk in training.model:
            chunk.train()
        return found

    def losses_of(self, config: GPTConfig, weights: torch.Tensor) -> dict[str, float]:
        """Of weights that no training has; rounded to the model's dtypes."""
        training = self.used(config)
        put_weights(training, weights)
        return self.losses(training)


def _shape(config: GPTConfig) -> GPTConfig:
    """What a training must be built anew for."""
    decay: dict[str, Any] = {"lr_wsd_decay_style": None, "lr_wsd_decay_steps": 0}
    return replace(config, seed=0, lr_decay_steps=0, **decay)


def _tensors(training: Training) -> list[torch.Tensor]:
    """Parameters and expert biases of the model."""
    (chunk,) = training.model
    biases = [one for name, one in chunk.named_buffers() if name.endswith("expert_bias")]
    return [*chunk.parameters(), *biases]


def weights_of(training: Training) -> torch.Tensor:
    """(elements,) float32: main params, and expert biases."""
    parts = [getattr(one, "main_param", one) for one in _tensors(training)]
    return torch.cat([part.detach().float().flatten() for part in parts])


@torch.no_grad()
def put_weights(training: Training, weights: torch.Tensor) -> None:
    """Into the model, not into its main params: for evaluation."""
    tensors = _tensors(training)
    parts = weights.split([one.numel() for one in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
