"""Every option of a merge, documented and checked once; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wsm_megatron.errors import UsageError
from wsm_megatron.option_values import local_path
from wsm_megatron.schedule.decay import DECAYS
from wsm_megatron.schedule.window import Window

OPTIMIZER_STATE = ("drop", "last", "merge")
BUFFERS = ("merge", "last")
DTYPES = ("same", "bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
FORMATS = ("same", "0.16", "0.19")


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """One merge. Raises ``UsageError`` for contradictory or impossible options."""

    load: Path = field(
        metadata={"help": "run directory: iter_XXXXXXX folders, torch_dist", "group": "run"}
    )
    save: Path = field(
        metadata={"help": "root of merged checkpoints, with a tracker of its own", "group": "run"}
    )

    iterations: tuple[int, ...] | None = _option(
        None, "exactly these iterations: 1000,2000,4000", group="which"
    )
    from_: int | None = _option(None, "oldest iteration, included", group="which")
    to: int | None = _option(
        None, "newest iteration, included (default: the tracker's)", group="which"
    )
    last: int | None = _option(None, "the N newest, up to --to", group="which", metavar="N")
    window_iterations: tuple[int, ...] | None = _option(
        None,
        "the last I iterations up to --to, both ends included; several make several merges",
        group="which",
        metavar="I,...",
    )
    window_tokens: tuple[int, ...] | None = _option(
        None,
        "the last T tokens up to --to, both ends included: 500M, 2B; several make several merges",
        group="which",
        metavar="T,...",
    )
    every: int | None = _option(
        None, "of those, only multiples of I iterations back from the newest", group="which"
    )

    sliding_every: int | None = _option(
        None,
        "also merge the windows that end S, 2S, ... iterations before --to, while whole",
        group="which",
        metavar="S",
    )

    decay: str = _option(
        "linear",
        f"decay shape: {', '.join(DECAYS)}, or a CSV file of t,s; several, separated by commas, "
        "make several merges",
        group="how",
    )
    min_decay: float = _option(
        0.0, "floor of the decay: minimum LR as a fraction of the maximum", group="how"
    )
    weights: tuple[float, ...] | None = _option(
        None,
        "explicit coefficients, oldest first, instead of --decay: 0.2,0.3,0.5 or 1/3,1/3,1/3",
        group="how",
    )
    allow_unnormalized: bool = _option(
        False, "let --weights sum to something other than 1", group="how"
    )
    optimizer_state: str = _option(
        "drop",
        "drop: weights only; last: mains merged, moments of the newest source; merge: both merged",
        choices=OPTIMIZER_STATE,
        group="how",
    )
    mains_from_model: bool = _option(
        False, "rebuild main params from the merged model instead of merging them", group="how"
    )
    buffers: str = _option(
        "merge",
        "fp32 buffers such as expert_bias: merged, or of the newest source",
        choices=BUFFERS,
        group="how",
    )
    dtype: str = _option("same", "dtype of the merged model tensors", choices=DTYPES, group="how")
    format: str = _option(
        "same",
        "where the common state goes: 0.16 in common.pt, which every Megatron reads; 0.19 in the "
        "distcp files, read from core 0.19 on; same as in the newest source",
        choices=FORMATS,
        group="how",
    )
    output_iteration: int | None = _option(
        None, "iteration of the merged checkpoint (default: the newest source's)", group="how"
    )
    copy: tuple[str, ...] = _option(
        (),
        "copy entries whose key matches from the newest source, a model tensor with its main param "
        "and moments (repeatable)",
        group="how",
    )
    drop: tuple[str, ...] = _option(
        (),
        "leave out entries whose key matches, a model tensor with its main param and moments "
        "(repeatable)",
        group="how",
    )
    allow_nonfinite: bool = _option(False, "merge NaN and Inf instead of refusing", group="how")
    allow_lr_decay: bool = _option(
        False, "merge a window inside of which the LR warms up or decays", group="how"
    )
    threads: int | None = _option(
        None, "worker threads a rank (default: the cores it may use, at most 16)", group="job"
    )
    device: str = _option(
        "auto",
        "what sums: auto measures both and takes the faster",
        choices=DEVICES,
        group="job",
    )
    memory: int | None = _option(
        None,
        "bytes in flight on a rank, tiles and what is read ahead of them: 256MiB, 2GiB (default: "
        "an eighth of the free memory, at most 512MiB)",
        group="job",
        metavar="SIZE",
        parse="bytes",
    )
    direct_io: bool = _option(False, "read tensors past the page cache (O_DIRECT)", group="job")
    source_parallel: bool = _option(
        False,
        "ranks see different parts of --load, as on node-local storage: each reads what it sees, "
        "and sums go from rank to rank; --save is shared by all",
        group="job",
    )
    retries: int = _option(
        3, "how often a read that failed is tried again", group="job", metavar="N"
    )
    log_json: Path | None = field(
        default=None,
        metadata={
            "help": "append what happens to this file, for all ranks: one JSON object a line",
            "group": "job",
            "metavar": "FILE",
        },
    )

    def __post_init__(self) -> None:
        self._check_paths()
        for option in fields(self):
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if choices and value not in choices:
                raise UsageError(f"{flag(option.name)} is {value!r}, not one of {choices}")
        for name in ("window_iterations", "window_tokens"):
            if isinstance(value := getattr(self, name), int):
                object.__setattr__(self, name, (value,))
        self._check_which()
        self._check_how()

    @property
    def windows(self) -> tuple[Window, ...]:
        """The selections of source checkpoints, all ending at ``to``."""
        iterations = self.window_iterations or (None,)
        tokens = self.window_tokens or (None,)
        return tuple(
            Window(
                iterations=self.iterations,
                from_=self.from_,
                to=self.to,
                last=self.last,
                window_iterations=i,
                window_tokens=t,
                every=self.every,
            )
            for i in iterations
            for t in tokens
        )

    @property
    def decays(self) -> tuple[str, ...]:
        return tuple(one.strip() for one in self.decay.split(","))

    @property
    def keeps_optimizer(self) -> bool:
        return self.optimizer_state != "drop"

    def _check_paths(self) -> None:
        paths = {name: getattr(self, name) for name in ("load", "save", "log_json")}
        for name, value in paths.items():
            if value is not None:
                object.__setattr__(self, name, local_path(value, flag(name)))
        for decay in self.decays:
            local_path(decay, "--decay")

    def _check_which(self) -> None:
        windows = self.windows  # contradictions between the window's options raise here
        if len(set(windows)) < len(windows) or len(set(self.decays)) < len(self.decays):
            raise UsageError("the same window or decay is named twice")
        if self.sliding_every is None:
            return
        if self.sliding_every < 1:
            raise UsageError(f"--sliding-every {self.sliding_every} must be at least 1")
        if self.last is None and self.window_iterations is None:
            raise UsageError("--sliding-every needs --last or --window-iterations to slide")
        if self.output_iteration is not None:
            raise UsageError("--sliding-every names each merge by its end: no --output-iteration")

    def _check_how(self) -> None:
        if not 0.0 <= self.min_decay <= 1.0:
            raise UsageError(f"--min-decay {self.min_decay} is not between 0 and 1")
        if self.weights is not None:
            self._check_weights(self.weights)
        elif self.allow_unnormalized:
            raise UsageError("--allow-unnormalized has no effect without --weights")
        if self.mains_from_model and not self.keeps_optimizer:
            raise UsageError(
                "--mains-from-model has no effect with --optimizer-state drop: no mains are kept"
            )
        if self.output_iteration is not None and self.output_iteration < 0:
            raise UsageError(f"--output-iteration {self.output_iteration} is negative")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads} must be at least 1")
        if self.memory is not None and self.memory < 1:
            raise UsageError(f"--memory {self.memory} must be positive")
        if self.retries < 0:
            raise UsageError(f"--retries {self.retries} is negative")
        if self.save.resolve() == self.load.resolve():
            raise UsageError(
                f"--save {self.save} is the run itself; sources are never written to, give another "
                "directory"
            )

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if self.decay != "linear" or self.min_decay:
            raise UsageError("--weights and --decay/--min-decay contradict each other: give one")
        if self.iterations is not None and list(self.iterations) != sorted(self.iterations):
            raise UsageError(
                "--weights are oldest first: give --iterations in ascending order with them"
            )
        if self.optimizer_state == "merge" and min(weights, default=0.0) < 0:
            raise UsageError(
                "negative --weights can make the merged second moment negative; use "
                "--optimizer-state last or drop"
            )


def flag(name: str) -> str:
    """Command-line flag of an option."""
    return "--" + name.strip("_").replace("_", "-")
