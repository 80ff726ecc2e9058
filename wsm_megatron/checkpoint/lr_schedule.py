"""The learning rate at which a checkpoint was saved, from its common state.

Megatron keeps the scheduler's settings and its step in ``opt_param_scheduler`` (``state_dict`` of
``OptimizerParamScheduler``); only ``args`` say how long WSD anneals and where the warm-up starts.
Steps are samples. Where no scheduler was saved ``args`` say all, the consumed samples being the
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-6
"""Relative difference up to which learning rates are one."""

WARM_UP, CONSTANT, DECAY = "warm-up", "constant", "decay"


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of the next step, the schedule's highest, and the phase it is in."""

    value: float
    peak: float
    phase: str

    @property
    def is_peak(self) -> bool:
        return self.value >= self.peak * (1 - TOLERANCE)


@dataclass(frozen=True)
class _Schedule:
    """Settings of ``OptimizerParamScheduler``, and its step."""

    style: str
    peak: float
    floor: float
    start: float
    step: float
    warm_up: float
    end: float
    wsd_steps: float | None
    wsd_style: str

    def now(self) -> LearningRate | None:
        """As ``get_lr`` has it; None for a style that is not known."""
        if self.warm_up > 0 and self.step < self.warm_up:
            done = self.step / self.warm_up
            return LearningRate(self.start + (self.peak - self.start) * done, self.peak, WARM_UP)
        if self.style == "constant":
            return LearningRate(self.peak, self.peak, CONSTANT)
        if self.step > self.end:
            return LearningRate(self.floor, self.peak, DECAY)
        if self.style == "inverse-square-root":
            value = self.peak * math.sqrt(max(self.warm_up, 1) / max(self.step, 1))
            return LearningRate(max(self.floor, value), self.peak, DECAY)
        return self._scaled(self._multiplier())

    def _multiplier(self) -> float | None:
        if self.style == "WSD":
            if not self.wsd_steps or self.wsd_steps < 0 or self.wsd_style not in _SHAPES:
                return None
            done = self.step - (self.end - self.wsd_steps)
            return 1.0 if done <= 0 else _SHAPES[self.wsd_style](done / self.wsd_steps)
        if self.style not in ("linear", "cosine") or self.end <= self.warm_up:
            return None
        return _SHAPES[self.style]((self.step - self.warm_up) / (self.end - self.warm_up))

    def _scaled(self, multiplier: float | None) -> LearningRate | None:
        if multiplier is None:
            return None
        value = self.floor + multiplier * (self.peak - self.floor)
        phase = CONSTANT if multiplier == 1.0 and self.style == "WSD" else DECAY
        return LearningRate(value, self.peak, phase)


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1.0),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}


def learning_rate(state: Mapping[str, Any], args: Mapping[str, Any]) -> LearningRate | None:
    """The learning rate of a checkpoint with this common state; None where it does not say."""
    scheduler = state.get("opt_param_scheduler", state.get("lr_scheduler"))
    settings = _from_scheduler(scheduler) if isinstance(scheduler, Mapping) else _from_args(args)
    numbers = {name: _number(settings.get(name)) for name in ("peak", "floor", "step", "warm_up")}
    if not isinstance(settings["style"], str) or None in numbers.values():
        return None
    end = _number(settings.get("end"))
    if end is None and settings["style"] != "constant":
        return None
    batch = _number(args.get("global_batch_size"))
    schedule = _Schedule(
        style=settings["style"],
        **{name: value or 0.0 for name, value in numbers.items()},
        start=_number(args.get("lr_warmup_init")) or 0.0,
        end=end or 0.0,
        wsd_steps=_steps(args, "lr_wsd_decay", batch),
        wsd_style=str(args.get("lr_wsd_decay_style")),
    )
    return schedule.now() if schedule.peak > 0 else None


def _from_scheduler(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Older names are those that ``load_state_dict`` takes too."""
    names = {
        "style": ("lr_decay_style", "decay_style"),
        "peak": ("max_lr", "start_lr"),
        "floor": ("min_lr",),
        "step": ("num_steps", "num_iters"),
        "warm_up": ("lr_warmup_steps", "warmup_steps", "warmup_iter"),
        "end": ("lr_decay_steps", "decay_steps", "end_iter"),
    }
    return {
        ours: next((scheduler[name] for name in theirs if name in scheduler), None)
        for ours, theirs in names.items()
    }


def _from_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """What ``get_optimizer_param_scheduler`` makes of the arguments."""
    batch = _number(args.get("global_batch_size"))
    end = _steps(args, "lr_decay", batch) or _steps(args, "train", batch)
    fraction = _number(args.get("lr_warmup_fraction"))
    warm_up = _steps(args, "lr_warmup", batch)
    if fraction is not None:
        warm_up = None if end is None else fraction * end
    return {
        "style": args.get("lr_decay_style"),
        "peak": args.get("lr"),
        "floor": args.get("min_lr"),
        "step": args.get("consumed_train_samples"),
        "warm_up": warm_up,
        "end": end,
    }


def _steps(args: Mapping[str, Any], name: str, batch: float | None) -> float | None:
    """A length in samples, which a run gives in iterations without ``--train-samples``."""
    if args.get("train_samples"):
        return _number(args.get(f"{name}_samples"))
    iterations = _number(args.get(f"{name}_iters"))
    return None if iterations is None or batch is None else iterations * batch


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
