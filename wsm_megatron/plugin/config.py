"""WSMConfig: every option of the training plugin, documented and checked once.

The ``--wsm-merge-*`` flags (``arguments.py``), the YAML file and Python callers all end here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wsm_megatron.errors import UsageError
from wsm_megatron.schedule.decay import DECAYS, coefficients

STORES = ("memory", "disk")
OPTIMIZER_STATES = ("last", "merge", "drop")


def _option(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class WSMConfig:
    """What is kept, how it is merged, and what is done with the merge.

    One of ``num``, ``window_iters`` and ``window_tokens`` says how far back a merge reaches.
    Raises ``UsageError``, naming the flags, for contradictions and numbers out of range.
    """

    num: int | None = _option("merge the last N kept checkpoints", type=int, metavar="N")
    window_iters: int | None = _option(
        "merge the checkpoints kept over the last I iterations, both ends included",
        type=int,
        metavar="I",
    )
    window_tokens: int | None = _option(
        "merge the checkpoints kept over the last T tokens, both ends included",
        type=int,
        metavar="T",
    )
    interval: int | None = _option(
        "keep shards every I iterations (default: at every save)", type=int, metavar="I"
    )
    start_iter: int = _option(
        "keep nothing before iteration I, e.g. the switch to annealing data",
        default=0,
        type=int,
        metavar="I",
    )
    decay: str = _option(
        f"decay shape: one of {', '.join(DECAYS)}, or a CSV file of t,s points",
        default="linear",
        metavar="SHAPE",
    )
    min_decay: float = _option(
        "floor of the decay: the minimum LR as a fraction of the maximum",
        default=0.0,
        type=float,
        metavar="M",
    )
    store: str = _option("where kept shards live", default="memory", choices=STORES)
    dir: str | None = _option(
        "folder of the disk store, may be local to the node (default: SAVE/wsm_shards)",
        metavar="DIR",
    )
    save_interval: int | None = _option(
        "emit a merged checkpoint every I iterations (always at the end of training, and at the "
        "next keep after SIGUSR2)",
        type=int,
        metavar="I",
    )
    save: str | None = _option(
        "root of the merged checkpoints, with its own tracker (default: SAVE/wsm)", metavar="DIR"
    )
    eval: bool = _option(
        "evaluate the merged weights whenever Megatron evaluates, on the same batches",
        default=False,
    )
    optimizer_state: str = _option(
        "moments of merged checkpoints: the newest ones, merged ones (three times the memory), or "
        "no optimizer state at all",
        default="last",
        choices=OPTIMIZER_STATES,
    )
    allow_lr_decay: bool = _option(
        "merge although the LR schedule decays too: the effective decay is then the product",
        default=False,
    )

    def __post_init__(self) -> None:
        self._check_values()
        given = [
            f for f in ("num", "window_iters", "window_tokens") if getattr(self, f) is not None
        ]
        if len(given) != 1:
            window = "--wsm-merge-num, --wsm-merge-window-iters and --wsm-merge-window-tokens"
            raise UsageError(f"give exactly one of {window}, not {len(given)}")
        if self.num == 1:
            raise UsageError("--wsm-merge-num 1: a merge needs at least two checkpoints")
        if self.interval is not None and (self.window_iters or self.interval) < self.interval:
            raise UsageError(
                f"--wsm-merge-window-iters {self.window_iters} is shorter than "
                f"--wsm-merge-interval {self.interval}: a merge needs at least two checkpoints"
            )
        if self.dir is not None and self.store != "disk":
            raise UsageError("--wsm-merge-dir has no effect without --wsm-merge-store disk")
        coefficients((0, 1), self.decay, self.min_decay)  # refuses unknown shapes and bad floors

    def _check_values(self) -> None:
        for f in fields(self):
            value, flag = getattr(self, f.name), flag_of(f.name)
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise UsageError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
            kind = f.metadata.get("type")
            if kind is int and value is not None and (type(value) is not int or value < 0):
                raise UsageError(f"{flag} must be a non-negative whole number, not {value!r}")
            if kind is int and value == 0 and f.name != "start_iter":
                raise UsageError(f"{flag} must be at least 1, not 0")
            if kind is float and not isinstance(value, (int, float)):
                raise UsageError(f"{flag} must be a number, not {value!r}")
            if isinstance(f.default, bool) and not isinstance(value, bool):
                raise UsageError(f"{flag} must be true or false, not {value!r}")
            if kind is None and isinstance(value, (int, float)) and not isinstance(f.default, bool):
                raise UsageError(f"{flag} must be text, not {value!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> WSMConfig:
        """A config from option names (``save-interval`` or ``save_interval``) and their values.

        ``where`` says in errors where the names came from. Raises ``UsageError`` for unknown names.
        """
        options = {name.replace("-", "_"): value for name, value in values.items()}
        if unknown := sorted(set(options) - {f.name for f in fields(cls)}):
            known = ", ".join(f.name for f in fields(cls))
            raise UsageError(f"{where}: unknown option {', '.join(unknown)}; there are {known}")
        return cls(**options)


def flag_of(name: str) -> str:
    """The command-line flag of a field of :class:`WSMConfig`."""
    return "--wsm-merge-" + name.replace("_", "-")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options of a YAML file: one mapping of option names to values.

    Raises ``UsageError`` naming the file where it cannot be read or is anything else.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--wsm-merge-config {path}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--wsm-merge-config {path}: expected a mapping of option names to values")
    return values
