"""Whether and how Megatron resumes from a checkpoint, told without a GPU and without the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.checkpoint.common_state import (
    attributes,
    integer_in,
    load_common,
    read_common,
    summarize,
)
from wsm_megatron.checkpoint.keys import (
    MAINS,
    Role,
    is_flat_bucket,
    is_optimizer,
    state_key,
    state_of,
)
from wsm_megatron.checkpoint.layout import Layout, read_layout
from wsm_megatron.checkpoint.run_directory import TRACKER_FILE, scan_run, why_untracked
from wsm_megatron.errors import UsageError, some
from wsm_megatron.inspection.lookup import is_checkpoint, is_tracker, tracked_checkpoint
from wsm_megatron.inspection.manifest import check_files
from wsm_megatron.optimizer.indexed_state import unnamed_mains, with_names
from wsm_megatron.optimizer.main_params import MainsCheck, check_main_params
from wsm_megatron.optimizer.precision import REMAINDERS
from wsm_megatron.planning.launch_flags import Launch, launches, position_of
from wsm_megatron.planning.provenance import read_provenance

REPLICATED = "replicated"
DP_RESHARDABLE = "dp_reshardable"
FULLY_RESHARDABLE = "fully_reshardable"
_ANY_SIZES = (REPLICATED, FULLY_RESHARDABLE, "fully_sharded_model_space")
"""Layouts that Megatron loads into other TP and PP sizes (``checkpoint_fully_reshardable_formats``;
without the distributed optimizer there is no such limit)."""

_SIZES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "expert_model_parallel_size": "EP",
}


@dataclass(frozen=True)
class ResumeReport:
    """What Megatron's ``load_checkpoint`` will find in a checkpoint.

    Attributes:
        optimizer: layout of the optimizer state; None where there is none.
        sizes: TP, PP and EP of the checkpoint, where its args say.
        any_sizes: the optimizer state loads into other TP and PP sizes.
        container: where the common state lies: ``common.pt`` or ``common_state`` entry.
        readers: Megatron versions that read this container.
        problems: why plain ``--load`` does not resume; empty when it does.
        notes: what to know.
        launches: flags for each goal.
    """

    path: Path
    iteration: int | None
    tokens: int | None
    merged: bool
    optimizer: str | None
    moments: int
    mains: MainsCheck
    scheduler: dict[str, Any] | None
    rng: int
    sizes: dict[str, int]
    any_sizes: bool
    container: str
    readers: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    launches: tuple[Launch, ...]

    @property
    def resumes(self) -> bool:
        """Plain ``--load`` continues from these weights."""
        return not self.problems


def check_resume(path: Path, against: Path | None = None) -> ResumeReport:
    """Check a checkpoint, or the one that a root's tracker names.

    Args:
        against: the run (its newest checkpoint) or checkpoint whose launch line would resume from
            ``path``: differences are reported.

    Raises:
        UsageError: not a finished checkpoint. MergeError: a damaged one.
    """
    path = _checkpoint(path)
    layout = with_names(read_layout(path))
    state = load_common(*read_common(path, layout))
    summary, optimizer = summarize(state), optimizer_layout(layout, state)
    mains = check_main_params(layout, attributes(state.get("args")))
    provenance = read_provenance(path)
    problems = [*_problems(layout, state, optimizer, mains)]
    if mains.remainders and provenance is not None:
        problems += _changed(path, provenance)
    notes = [*_notes(layout, state, optimizer, mains)]
    usable = optimizer is not None and not problems
    if against is not None:
        problems += _differences(layout, state, _checkpoint(against))
    return ResumeReport(
        path=path,
        iteration=summary.iteration,
        tokens=summary.tokens,
        merged=provenance is not None,
        optimizer=optimizer,
        moments=sum(entry.role is Role.MOMENT for entry in layout.tensors.values()),
        mains=mains,
        scheduler=state.get("opt_param_scheduler"),
        rng=sum(entry.role is Role.RNG for entry in layout.entries.values()),
        sizes=_sizes(state),
        any_sizes=optimizer is None or optimizer in _ANY_SIZES,
        container=layout.format.container,
        readers=layout.format.readers,
        problems=tuple(problems),
        notes=tuple(notes),
        launches=()
        if optimizer is None and not layout.format.loads_weights_alone
        else launches(optimizer=usable, position=position_of(state)),
    )


def optimizer_layout(layout: Layout, state: Mapping[str, Any]) -> str | None:
    """How a checkpoint's optimizer state is sharded; None where it has none.

    ``content_metadata`` names it (``distrib_optim_sharding_type``) with the distributed optimizer;
    before Megatron-core 0.13 and without that optimizer the keys tell. Without main params the
    model is what the optimizer steps on (``FP32Optimizer``).
    """
    if layout.format.optimizer_layout is not None:
        return layout.format.optimizer_layout if any(map(is_optimizer, layout.tensors)) else None
    keys = [key for key in layout.tensors if state_of(key)]
    if not keys and "optimizer" not in state:
        return None
    named = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    if named:
        return str(named) if keys else None
    if any(map(is_flat_bucket, keys)):
        return DP_RESHARDABLE
    return FULLY_RESHARDABLE if any(".state.param." in key for key in keys) else REPLICATED


def _checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the one Megatron would load from that root or tracker."""
    if is_tracker(path):
        return tracked_checkpoint(path)
    if is_checkpoint(path):
        return path
    run = scan_run(path)
    if run.tracked is not None:
        return run.checkpoint(run.tracked)
    if not run.finished and run.tracker is None:
        raise UsageError(f"{path}: no finished checkpoint in this directory")
    if run.tracker is not None:
        raise UsageError(
            f"{path / TRACKER_FILE} {why_untracked(run.tracker)}; name the checkpoint that is meant"
        )
    raise UsageError(
        f"{path}: no tracker (latest_checkpointed_iteration.txt), so Megatron would load nothing "
        f"from here and start at iteration 0; name a checkpoint, such as "
        f"{run.checkpoint(run.finished[-1])}"
    )


def _problems(
    layout: Layout, state: Mapping[str, Any], optimizer: str | None, mains: MainsCheck
) -> Iterator[str]:
    args = attributes(state.get("args"))
    if optimizer is None and not layout.format.loads_weights_alone:
        yield (
            f"no optimizer state: Megatron's load of {layout.format.name} asks for it, and for RNG "
            "states, whatever the flags; merge again with --optimizer-state last or merge, or load "
            "the weights with torch.distributed.checkpoint"
        )
        return
    if optimizer is None:
        yield (
            "no optimizer state: plain --load stops with KeyError 'optimizer'; pass "
            "--no-load-optim, and mind the LR scheduler"
        )
        return
    if args.get("no_save_optim") is True:
        yield (
            "args say no_save_optim although there is optimizer state: Megatron will not load it, "
            "and stops with KeyError 'optimizer'"
        )
    if args.get("optimizer") == "sgd" and layout.format.optimizer_layout is None:
        yield (
            "saved with --optimizer sgd: Megatron-LM, from core 0.14 to main of August 2026, loads "
            "no state of SGD, its own neither (TypeError: init_state_fn is None); pass "
            "--no-load-optim, and momentum starts at zero"
        )
    wanted = ("optimizer",) if layout.format.optimizer_layout is None else ()
    for key in (*wanted, "opt_param_scheduler"):
        if key not in state and not (key == "opt_param_scheduler" and "lr_scheduler" in state):
            yield f"the common state has no {key!r}: plain --load stops with KeyError"
    if unnamed := unnamed_mains(layout):
        yield (
            f"{some(unnamed)} round to no model tensor: one step after a load main params of other "
            "weights replace the model's"
        )
    yield from _wrong_mains(layout, mains)
    if unbacked := _without_moments(layout, args):
        yield f"no moments for {some(unbacked)}: Megatron will find keys missing"


def _wrong_mains(layout: Layout, mains: MainsCheck) -> Iterator[str]:
    if mains.wrong:
        again = "" if mains.buckets else ", or merge again with --rebuild-main-params"
        yield (
            f"the main params of {len(mains.wrong)} model tensors are of other weights "
            f"({some(mains.wrong)}): one step after a load they replace the model's; launch with "
            f"--no-load-optim{again}"
        )
    if as_floats := [key for key in mains.remainders if _is_float_remainder(layout, key)]:
        yield (
            f"in place of the main params of {len(as_floats)} model tensors lie {REMAINDERS}. "
            "fully_reshardable saves them as float32, which Transformer Engine does not take back "
            "(Megatron-LM #4222); launch with --no-load-optim"
        )


def _changed(path: Path, provenance: dict[str, Any]) -> list[str]:
    """Whether a merge's files are those that it wrote, where their contents do not tell."""
    problems = check_files(path, provenance).problems
    return [f"not what the merge wrote, so remainders may be of other weights: {problems}"] * bool(
        problems
    )


def _is_float_remainder(layout: Layout, model: str) -> bool:
    mains = (layout.tensors.get(f"optimizer.state.param.{model}"), layout.tensors.get(model))
    return not is_flat_bucket(model) and all(e and e.dtype.is_floating_point for e in mains)


def _without_moments(layout: Layout, args: Mapping[str, Any]) -> list[str]:
    """Keys that Megatron will ask for and not find.

    Adam has two moments of every main param. Of another optimizer's main params all have state
    where some have.
    """
    names: dict[tuple[str, str], set[str]] = {}
    mains: list[tuple[str, str]] = []
    for key in layout.tensors:
        if found := state_of(key):
            group, param, name = found
            known = names.setdefault((group, param), set())
            if name in MAINS:
                mains.append((group, param))
            else:
                known.add(name)
    every = {name for found in names.values() for name in found}
    if every <= _ADAM and args.get("optimizer", "adam") in ("adam", "adamw"):
        return [
            state_key(group, name, param)
            for group, param in mains
            for name in sorted(_ADAM - names[group, param])
        ]
    groups = {group for (group, _), found in names.items() if found}
    return [
        state_key(group, "*", param)
        for group, param in mains
        if group in groups and not names[group, param]
    ]


_ADAM = {"exp_avg", "exp_avg_sq"}


def _notes(
    layout: Layout, state: Mapping[str, Any], optimizer: str | None, mains: MainsCheck
) -> Iterator[str]:
    args = attributes(state.get("args"))
    if mains.near:
        within = "within the error of the format"
        if not mains.bounded:
            within = (
                "in a format whose error is not known here: whether they belong to these cannot be "
                "told"
            )
        yield (
            f"saved with {mains.why_unlike}: main params are more precise than their model tensors "
            f"by design, {within}"
        )
    if mains.remainders:
        yield (
            f"in place of main params lie {REMAINDERS}; these fit any weights, so whether they are "
            "of these cannot be told by them"
        )
    if mains.unknown:
        yield (
            f"{mains.unknown} elements of the flat buckets round to no model tensor"
            + ("" if mains.wrong else " (copies that drifted apart?)")
        )
    if mains.without:
        yield f"no main params for {some(mains.without)}: loaded from the model, frozen or not"
    keyed_by_format = layout.format.optimizer_layout is not None
    if optimizer is not None and optimizer not in _ANY_SIZES and not keyed_by_format:
        yield (
            f"{optimizer} optimizer state loads into the same TP, PP and EP sizes only (another DP "
            "size is fine)"
        )
    yield from layout.format.notes
    if optimizer is not None and not keyed_by_format:
        needs = "without" if optimizer == REPLICATED else "with"
        yield f"the launch must be {needs} --use-distributed-optimizer, as the checkpoint was saved"
    if optimizer in (REPLICATED, FULLY_RESHARDABLE) and integer_in(args, "num_experts"):
        yield (
            "the optimizer of EP1 is one, of larger EP sizes two (dense, experts): megatron-core "
            "does not load one as the other"
        )
    rng = any(entry.role is Role.RNG for entry in layout.entries.values())
    if args.get("no_save_rng") is True or not rng:
        yield "no RNG states: dropout starts from --seed again (the data's order does not)"
    if "args" not in state:
        yield "no args: Megatron-LM will not know consumed samples (saved by another loop?)"


def _differences(layout: Layout, state: Mapping[str, Any], other: Path) -> Iterator[str]:
    """What keeps another checkpoint's launch line from resuming from this one."""
    theirs = read_layout(other)
    their_state = load_common(*read_common(other, theirs))
    for name, here, there in (
        (
            "optimizer layout",
            optimizer_layout(layout, state),
            optimizer_layout(theirs, their_state),
        ),
        ("LR scheduler", _settings(state), _settings(their_state)),
        ("parallel sizes", _sizes(state), _sizes(their_state)),
    ):
        if here != there and here and there:
            yield f"{name} {here} differs from {other}: {there}"
    shapes, their_shapes = _model_shapes(layout), _model_shapes(theirs)
    differing = sorted(
        key
        for key in shapes.keys() | their_shapes.keys()
        if shapes.get(key) != their_shapes.get(key)
    )
    if differing:
        yield f"not the model of {other}: {some(differing)}"


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    scheduler = state.get("opt_param_scheduler") or {}
    return {key: value for key, value in scheduler.items() if key != "num_steps"}


def _sizes(state: Mapping[str, Any]) -> dict[str, int]:
    args = attributes(state.get("args"))
    return {short: args[name] for name, short in _SIZES.items() if name in args}


def _model_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    return {key: e.shape for key, e in layout.tensors.items() if e.role is Role.MODEL}
