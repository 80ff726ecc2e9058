"""``wsm inspect``: what is in a checkpoint or a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from wsm_megatron.checkpoint.common_state import CommonSummary
from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.figures import known_tokens, size
from wsm_megatron.inspection.inspect import (
    CheckpointContents,
    RunContents,
    inspect_checkpoint,
    inspect_run,
    is_checkpoint,
)
from wsm_megatron.options import local_path, typed


def add_inspect(commands: Any, help: str) -> None:
    """Add the command."""
    command = add(commands, "inspect", _inspect, help)
    command.add_argument("directory", type=typed(local_path))
    command.add_argument("--entries", action="store_true", help="list every entry")


def _inspect(arguments: argparse.Namespace) -> Answer:
    path = arguments.directory
    if is_checkpoint(path):
        contents = inspect_checkpoint(path)
        lines = _checkpoint(contents, arguments.entries)
        return Answer(lines, lambda: _checkpoint_data(contents), shown=True)
    run = inspect_run(path)
    return Answer(_run(run), lambda: _run_data(run), shown=True)


def _checkpoint(contents: CheckpointContents, entries: bool) -> Iterator[str]:
    said = contents.summary
    yield f"{contents.path}: iteration {said.iteration}, tokens {_counted(said)}"
    form = contents.format
    yield f"  {form.name}, finished by {form.finished_by}, common state: {form.container}"
    if said.learning_rate is not None:
        yield f"  learning rate {said.learning_rate.value:.6g}"
    for role, found in contents.by_role.items():
        total = sum(entry.nbytes for entry in found)
        yield f"  {role.value:16} {len(found):6} entries {size(total):>9}"
        if entries:
            for entry in sorted(found, key=lambda entry: entry.key):
                yield f"    {entry.key} {_shape(entry)}"
    yield f"  {'all':16} {'':6}         {size(contents.nbytes):>9}"
    if contents.provenance is not None:
        merged_from = ", ".join(map(_source, contents.provenance["sources"]))
        yield f"  merged from iterations {merged_from}"


def _source(said: dict[str, Any]) -> str:
    """A source of a merge; of one inside a run it may be an average over steps."""
    text = str(said["iteration"])
    if "mean" in said:
        return f"{text} (mean of {said['mean']['points']} steps)"
    return f"{text} (moving average)" if "moving_average" in said else text


def _checkpoint_data(contents: CheckpointContents) -> dict[str, Any]:
    return {
        "path": str(contents.path),
        "iteration": contents.summary.iteration,
        "tokens": contents.summary.tokens,
        "bytes": contents.nbytes,
        "format": contents.format.name,
        "finished_by": contents.format.finished_by,
        "entries": {
            entry.key: {
                "role": role.value,
                "dtype": str(getattr(entry, "dtype", "bytes")).removeprefix("torch."),
                "shape": list(getattr(entry, "shape", ())),
                "bytes": entry.nbytes,
            }
            for role, found in contents.by_role.items()
            for entry in found
        },
        "provenance": contents.provenance,
    }


def _run(contents: RunContents) -> Iterator[str]:
    tracker = "missing" if contents.tracker is None else contents.tracker or "empty"
    yield f"{contents.path}: tracker {tracker}"
    if contents.tracker_problem:
        yield f"  the tracker {contents.tracker_problem}"
    for one in contents.checkpoints:
        kind = "merged" if one.is_merged else "trained"
        lr = "" if one.lr is None else f"  LR {one.lr:.4g}"
        line = f"  iteration {one.iteration:>9}  tokens {known_tokens(one.tokens):>16}  {kind}{lr}"
        yield "; ".join([line, *one.marks])
    for unusable in contents.unusable:
        yield f"  {unusable}"


def _run_data(contents: RunContents) -> dict[str, Any]:
    return {
        "path": str(contents.path),
        "tracker": contents.tracker,
        "tracker_problem": contents.tracker_problem,
        "checkpoints": [
            {
                "iteration": one.iteration,
                "tokens": one.tokens,
                "merged": one.is_merged,
                "lr": one.lr,
                "marks": list(one.marks),
            }
            for one in contents.checkpoints
        ],
        "unfinished": list(contents.unfinished),
        "unusable": [
            {"name": one.name, "what": one.kind.what, "way_out": one.kind.way_out}
            for one in contents.unusable
        ],
    }


def _shape(entry: Any) -> str:
    if not hasattr(entry, "shape"):
        return f"({entry.nbytes} bytes)"
    dtype = str(entry.dtype).removeprefix("torch.")
    return f"{dtype} {list(entry.shape)} in {len(entry.chunks)} chunks"


def _counted(said: CommonSummary) -> str:
    if said.tokens is None:
        return "unknown"
    return f"{said.tokens:,} ({said.consumed_samples:,} samples of {said.seq_length:,})"
