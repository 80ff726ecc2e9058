"""What is merged, and how the job runs: every option of a merge, documented and checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from wsm_megatron.errors import UsageError
from wsm_megatron.named_source import NamedSource, named_sources
from wsm_megatron.options import (
    COUNT,
    NUMBER,
    PATH,
    SIZE,
    SWITCH,
    TEXT,
    Options,
    list_of,
    local_path,
    one_of,
    option,
    repeated,
)
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.decay import DECAYS
from wsm_megatron.schedule.order import ORDERS, SCRAMBLED, SEQUENTIAL
from wsm_megatron.schedule.window import Checkpoint
from wsm_megatron.window_options import WindowOptions

RUN, HOW, JOB = "run", "how they are merged", "job"
"""Headings that options stand under, beside WHICH."""

_PLACES = ("load", "source", "save")
"""Where a merge reads and writes, of which what is merged does not depend."""
_RECORDED_WHERE_SET = ("min_interval", "min_checkpoints", "order", "order_seed", "normalize")
"""Options that came later: a merge without them is recorded as it was before there were any."""
_RECORDED_AS = {"rebuild_main_params": "mains_from_model"}
"""Options that ``wsm_merge.json`` has under another name: the format keeps the first one."""


@dataclass(frozen=True, kw_only=True)
class Places(Options):
    """Where a merge reads and writes."""

    load: Path | None = option(
        "run directory: iter_XXXXXXX folders, torch_dist",
        PATH,
        None,
        default_text="required without --source",
        group=RUN,
        metavar="RUN",
    )
    source: tuple[str, ...] = option(
        "a source by its path, instead of --load: a checkpoint's folder, of any run and name, "
        "release/ too, or a root whose tracker names one; all have a weight, or none (repeatable)",
        repeated(TEXT),
        (),
        group=RUN,
        metavar="PATH[:WEIGHT]",
    )
    save: Path = option(
        "root of merged checkpoints, with a tracker of its own", PATH, group=RUN, metavar="OUT"
    )

    @property
    def run(self) -> Path:
        """The run directory, where there is one."""
        assert self.load is not None
        return self.load

    @property
    def sources(self) -> tuple[NamedSource, ...]:
        """The sources that were named by their paths, as they were named."""
        return named_sources(self.source)


@dataclass(frozen=True, kw_only=True)
class MergeConfig(WindowOptions, Places):
    """What is merged. All of it but the places is in the merged checkpoint's provenance.

    Raises ``UsageError`` for contradictory or impossible options.
    """

    decay: str = option(
        f"decay shape: {', '.join(DECAYS)}, or a CSV file of t,s points; several, separated by "
        "commas, make several merges",
        TEXT,
        "linear",
        group=HOW,
        metavar="SHAPE",
    )
    min_decay: float = option(
        "floor of the decay: minimum LR as a fraction of the maximum", NUMBER, 0.0, group=HOW
    )
    order: str = option(
        "order in which the coefficients of the decay go to the checkpoints: sequential, as the "
        "decay has them; reversed, the oldest gets the newest's and so on; scrambled, shuffled by "
        "--order-seed",
        one_of(ORDERS),
        SEQUENTIAL,
        group=HOW,
    )
    order_seed: int = option("seed of --order scrambled", COUNT, 0, group=HOW, least=0)
    weights: tuple[float, ...] | None = option(
        "explicit coefficients, oldest first, instead of --decay: 0.2,0.3,0.5 or 1/3,1/3,1/3; "
        "negative ones extrapolate",
        list_of(NUMBER),
        None,
        group=HOW,
    )
    allow_unnormalized: bool = option(
        "let weights sum to something other than 1", SWITCH, False, group=HOW
    )
    normalize: bool = option(
        "divide the weights by their sum, which must be positive", SWITCH, False, group=HOW
    )
    optimizer_state: str = option(
        "drop: weights only; last: main params merged, moments of the newest source; merge: both "
        "merged",
        one_of(("drop", "last", "merge")),
        "drop",
        group=HOW,
    )
    rebuild_main_params: bool = option(
        "rebuild main params from the merged model instead of merging them, for sources whose "
        "saved main params are wrong",
        SWITCH,
        False,
        group=HOW,
        old_name="mains_from_model",
    )
    buffers: str = option(
        "fp32 buffers such as expert_bias: merged, or of the newest source",
        one_of(("merge", "last")),
        "merge",
        group=HOW,
    )
    dtype: str = option(
        "dtype of the merged model tensors",
        one_of(("same", "bf16", "fp16", "fp32")),
        "same",
        group=HOW,
    )
    format: str = option(
        "where the common state goes: 0.16 in common.pt, which every Megatron reads; 0.19 in the "
        "distcp files, read from core 0.19 on; same as in the newest source",
        one_of(("same", "0.16", "0.19")),
        "same",
        group=HOW,
    )
    output_iteration: int | None = option(
        "iteration of the merged checkpoint",
        COUNT,
        None,
        default_text="the newest source's",
        group=HOW,
        metavar="I",
        least=0,
    )
    copy: tuple[str, ...] = option(
        "copy entries whose key matches from the newest source, a model tensor with its main param "
        "and moments (repeatable)",
        repeated(TEXT),
        (),
        group=HOW,
        metavar="PATTERN",
    )
    drop: tuple[str, ...] = option(
        "leave out entries whose key matches, a model tensor with its main param and moments "
        "(repeatable)",
        repeated(TEXT),
        (),
        group=HOW,
        metavar="PATTERN",
    )
    allow_nonfinite: bool = option(
        "merge NaN and Inf instead of refusing", SWITCH, False, group=HOW
    )
    allow_lr_decay: bool = option(
        "merge a window inside of which the LR warms up or decays", SWITCH, False, group=HOW
    )

    def check(self) -> None:
        for decay in self.decays:
            local_path(decay, "--decay")
        self._check_which()
        self._check_how()
        if self.load is None:
            self._check_sources()
        elif self.source:
            raise UsageError("--load and --source contradict each other: give one")
        elif self.save.resolve() == self.load.resolve():
            raise UsageError(
                f"--save {self.save} is the run itself; sources are never written to, give another "
                "directory"
            )

    @property
    def decays(self) -> tuple[str, ...]:
        return tuple(one.strip() for one in self.decay.split(","))

    @property
    def keeps_optimizer(self) -> bool:
        return self.optimizer_state != "drop"

    def weigh(self, checkpoints: Sequence[Checkpoint]) -> MergeCoefficients:
        """The coefficients of a merge of one decay over checkpoints, oldest first.

        Raises ``UsageError`` as :meth:`.MergeCoefficients.over` does.
        """
        (decay,) = self.decays
        return MergeCoefficients.over(
            checkpoints,
            decay,
            self.min_decay,
            self.weights,
            self.allow_unnormalized,
            normalize=self.normalize,
            order=self.order,
            order_seed=self.order_seed,
        )

    def recorded(self) -> dict[str, Any]:
        """The options in ``wsm_merge.json``: all but the places. Plain JSON types."""
        values = {
            _RECORDED_AS.get(one.name, one.name): getattr(self, one.name)
            for one in fields(self)
            if one.name not in _PLACES
            and (one.name not in _RECORDED_WHERE_SET or getattr(self, one.name) != one.default)
        }
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def of_record(cls, options: Mapping[str, Any]) -> MergeConfig:
        """The config that :meth:`recorded` these options; it names no places that exist.

        Raises:
            UsageError: another version recorded options that are not known here.
        """
        names = {one.name: one.name for one in fields(cls) if one.name not in _PLACES}
        names |= {old: name for name, old in _RECORDED_AS.items()}
        if unknown := sorted(options.keys() - names.keys()):
            raise UsageError(
                f"merged by another version, with options not known here: {', '.join(unknown)}"
            )
        values = {names[name]: value for name, value in options.items()}
        return cls(load=Path("sources"), save=Path("merged"), **values)

    def _check_sources(self) -> None:
        if not self.source:
            raise UsageError("give --load RUN, or the sources one by one with --source PATH")
        if chosen := self.given_windows():
            raise UsageError(f"{chosen[0]} selects checkpoints of a run, and --source names them")
        if self.weights is not None:
            raise UsageError("--weights with --source: give each its weight, --source PATH:WEIGHT")

    def _check_which(self) -> None:
        self.check_windows()
        if len(set(self.decays)) < len(self.decays):
            raise UsageError("the same decay is named twice")
        if self.sliding_every is not None and self.output_iteration is not None:
            raise UsageError("--sliding-every names each merge by its end: no --output-iteration")

    def _check_how(self) -> None:
        if not 0.0 <= self.min_decay <= 1.0:
            raise UsageError(f"--min-decay {self.min_decay} is not between 0 and 1")
        if self.order_seed and self.order != SCRAMBLED:
            raise UsageError("--order-seed has no effect without --order scrambled")
        weights = self.weights
        if weights is None and self.source:
            weights = tuple(one.weight for one in self.sources if one.weight is not None) or None
        if weights is not None:
            self._check_weights(weights)
        elif self.allow_unnormalized or self.normalize:
            flag = "--normalize" if self.normalize else "--allow-unnormalized"
            raise UsageError(
                f"{flag} has no effect without weights (--weights, --source PATH:WEIGHT)"
            )
        if self.rebuild_main_params and not self.keeps_optimizer:
            raise UsageError(
                "--rebuild-main-params has no effect with --optimizer-state drop: no main params "
                "are kept"
            )

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if self.decay != "linear" or self.min_decay or self.order != SEQUENTIAL:
            raise UsageError(
                "weights and --decay/--min-decay/--order contradict each other: give one"
            )
        if self.normalize and self.allow_unnormalized:
            raise UsageError("--normalize and --allow-unnormalized contradict each other: give one")
        if self.iterations is not None and list(self.iterations) != sorted(self.iterations):
            raise UsageError(
                "--weights are oldest first: give --iterations in ascending order with them"
            )
        if self.optimizer_state == "merge" and min(weights, default=0.0) < 0:
            raise UsageError(
                "negative weights can make the merged second moment negative; use "
                "--optimizer-state last or drop"
            )


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions(Options):
    """How the job runs. Nothing of it changes a bit of the merged checkpoint."""

    threads: int | None = option(
        "worker threads a rank",
        COUNT,
        None,
        default_text="the cores it may use, at most 16",
        group=JOB,
        least=1,
    )
    device: str = option(
        "what sums: auto measures both where there is much to read, and takes the faster",
        one_of(("auto", "cpu", "cuda")),
        "auto",
        group=JOB,
    )
    memory: int | None = option(
        "bytes in flight on a rank, tiles and what is read ahead of them: 256MiB, 2GiB",
        SIZE,
        None,
        default_text="an eighth of the free memory, 32MiB to 512MiB",
        group=JOB,
        least=1,
    )
    node_local: bool = option(
        "ranks see different parts of --load, as on node-local storage: each reads what it sees, "
        "and sums go from rank to rank; --save is shared by all",
        SWITCH,
        False,
        group=JOB,
        old_name="source_parallel",
    )
    trajectory: bool = option(
        "also take inner products of all sources, from the same read: norms, distances, what a "
        "decay averages away, and a warning of sources that are off the path; "
        "written to trajectory.json in --save",
        SWITCH,
        False,
        group=JOB,
    )
    retries: int = option(
        "how often a read that failed is tried again", COUNT, 3, group=JOB, least=0
    )
    log_json: Path | None = option(
        "append what happens to this file, for all ranks: one JSON object a line",
        PATH,
        None,
        group=JOB,
        metavar="FILE",
    )

    def check(self) -> None:
        if self.trajectory and self.node_local:
            raise UsageError(
                "--trajectory compares all sources on one rank, and with --node-local none sees "
                "all: leave one of the two out"
            )
