"""What the command line says: lines for people, plain data for ``--json``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from wsm_megatron.access.protocol import Estimate
from wsm_megatron.checkpoint.common_state import CommonSummary
from wsm_megatron.execution.result import MergeReport
from wsm_megatron.execution.timing import PHASES, RankReport
from wsm_megatron.export.job import ExportReport
from wsm_megatron.export.plan import ExportPlan
from wsm_megatron.inspection.inspect import CheckpointContents, RunContents
from wsm_megatron.inspection.megatron_resume import ResumeReport
from wsm_megatron.inspection.verify import VerifyReport
from wsm_megatron.planning.job import Job
from wsm_megatron.planning.launch_flags import GOALS, as_data
from wsm_megatron.planning.tasks import Recipe
from wsm_megatron.schedule.coefficients import MergeCoefficients

_RANKS_SHOWN = 16


def size(nbytes: float) -> str:
    """Bytes in decimal units, as storage counts them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def merged(done: MergeReport) -> Iterator[str]:
    moved = done.bytes_read + done.bytes_written
    for one in done.merged:
        yield from _source_lines(one.iterations, one.decay)
    yield f"read {size(done.bytes_read)}, wrote {size(done.bytes_written)}"
    yield f"{done.seconds:.2f} s, {size(moved / max(done.seconds, 1e-9))}/s"
    yield from _rank_lines(done.ranks)
    for one in done.merged:
        yield f"merged checkpoint: {one.output}"
    yield f"main params {done.resume['main_params']}, moments {done.resume['moments']}"
    yield from launch_lines(done.resume["launch"], str(done.output.parent))


def exported(done: ExportReport) -> Iterator[str]:
    what = f"{done.tensors} tensors, {size(done.nbytes)}"
    family = "Megatron's names" if done.family is None else done.family
    was = "was exported before" if done.already else f"exported in {done.seconds:.2f} s"
    yield f"{was}: {done.path} ({family}, {what})"


def would_export(target: Path, plan: ExportPlan) -> Iterator[str]:
    family = "Megatron's names" if plan.record["family"] is None else plan.record["family"]
    yield f"would export {target} ({family}, {size(plan.nbytes)} in {len(plan.shards)} files)"


def planned(job: Job, moved: Estimate) -> Iterator[str]:
    for output in job.outputs:
        yield f"would write {output.path}"
        yield from _source_lines(job.iterations(output), output.decay)
    yield from _recipe_lines(job.plan.recipes)
    for key in sorted(job.outputs[0].objects):
        yield f"  copied as it is      {key}"
    for file in job.sources[job.outputs[0].newest].beside.copied:
        yield f"  copied beside        {file.name}"
    for key in job.plan.left_out:
        yield f"  left out             {key}"
    if job.execution.node_local:
        yield f"sums of {size(moved.sent)} would go from rank to rank"
    yield f"would read {size(moved.read)}, write {size(moved.written)}; nothing was written"


def plan_data(job: Job, moved: Estimate) -> dict[str, Any]:
    output = job.outputs[-1]
    return {
        "output": str(output.path),
        "outputs": [str(output.path) for output in job.outputs],
        "iterations": list(job.iterations(output)),
        **decay_data(output.decay),
        **unit_data(output.decay),
        "bytes_to_read": moved.read,
        "bytes_to_write": moved.written,
        "bytes_to_send": moved.sent,
        "tensors": {recipe.key: recipe.what for recipe in job.plan.recipes},
        "objects": list(output.objects),
        "left_out": list(job.plan.left_out),
        "side_files": [file.name for file in job.sources[output.newest].beside.copied],
    }


def decay_table(decay: MergeCoefficients) -> Iterator[str]:
    yield from _coefficient_lines(decay.positions, decay, decay.unit)
    if decay.why_iterations:
        yield _unit(decay)


def decay_data(decay: MergeCoefficients) -> dict[str, Any]:
    return {
        "positions": list(decay.positions),
        "coefficients": list(decay.coefficients),
        "effective_lr": list(decay.effective_lr),
    }


def unit_data(decay: MergeCoefficients) -> dict[str, Any]:
    """The unit of a run's positions, and why it is not tokens; the learning rates that it says."""
    return {
        "unit": decay.unit,
        "why_iterations": decay.why_iterations,
        "lr": list(decay.lr),
    }


def checkpoint(contents: CheckpointContents, entries: bool) -> Iterator[str]:
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
        merged_from = ", ".join(str(s["iteration"]) for s in contents.provenance["sources"])
        yield f"  merged from iterations {merged_from}"


def checkpoint_data(contents: CheckpointContents) -> dict[str, Any]:
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


def run(contents: RunContents) -> Iterator[str]:
    tracker = "missing" if contents.tracker is None else contents.tracker or "empty"
    yield f"{contents.path}: tracker {tracker}"
    if contents.tracker_problem:
        yield f"  the tracker {contents.tracker_problem}"
    for one in contents.checkpoints:
        kind = "merged" if one.is_merged else "trained"
        lr = "" if one.lr is None else f"  LR {one.lr:.4g}"
        line = f"  iteration {one.iteration:>9}  tokens {_known(one.tokens):>16}  {kind}{lr}"
        yield "; ".join([line, *one.marks])
    for unusable in contents.unusable:
        yield f"  {unusable}"


def run_data(contents: RunContents) -> dict[str, Any]:
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


def verified(done: VerifyReport) -> Iterator[str]:
    kind = "merged checkpoint" if done.merged else "checkpoint"
    yield (
        f"{done.path}: {kind} is whole: {done.tensors} tensors and {done.objects} objects, "
        f"{size(done.bytes_read)} read, checksums and values right"
    )
    if done.merged:
        yield f"{done.files} files are what the merge wrote"
    if done.unchecked:
        yield (
            f"not checked, as the wsm_merge.json of an earlier version does not list them: "
            f"{', '.join(done.unchecked)}"
        )
    if done.recomputed is not None:
        how_many = "all" if done.recomputed == "all" else "some of"
        yield (
            f"{how_many} its elements recomputed from the sources, {done.samples:,}: the same bits"
        )


def resume(found: ResumeReport) -> Iterator[str]:
    kind = "merged checkpoint" if found.merged else "checkpoint"
    yield f"{found.path}: {kind}, iteration {found.iteration}, tokens {_known(found.tokens)}"
    sizes = ", ".join(f"{name}{size}" for name, size in found.sizes.items()) or "unknown"
    yield f"  saved with           {sizes}; common state in {found.container}"
    yield f"  read by              {found.readers}"
    yield f"  optimizer state      {_optimizer(found)}"
    yield f"  LR scheduler         {_scheduler(found.scheduler)}"
    yield f"  RNG states           {found.rng or 'none'}"
    for note in found.notes:
        yield f"  note: {note}"
    for problem in found.problems:
        yield f"  PROBLEM: {problem}"
    yield "plain --load resumes" if found.resumes else "plain --load does not resume"
    yield from launch_lines(as_data(found.launches), str(found.path.parent))


def resume_data(found: ResumeReport) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "resumes": found.resumes,
        "iteration": found.iteration,
        "tokens": found.tokens,
        "merged": found.merged,
        "optimizer": found.optimizer,
        "any_sizes": found.any_sizes,
        "sizes": found.sizes,
        "readers": found.readers,
        "wrong_mains": list(found.mains.wrong),
        "problems": list(found.problems),
        "notes": list(found.notes),
        "launches": as_data(found.launches),
    }


def launch_lines(launches: dict[str, dict[str, str]], root: str) -> Iterator[str]:
    """The flags of every goal, each with what happens then; from ``flags.as_data``."""
    if launches:
        yield "launch Megatron with the run's own flags and these:"
    for goal, launch in launches.items():
        yield f"  {GOALS[goal]}: {' '.join(filter(None, ('--load', root, launch['flags'])))}"
        yield f"      {launch['effect']}"


def _optimizer(found: ResumeReport) -> str:
    if found.optimizer is None:
        return "none"
    sizes = "any TP and PP" if found.any_sizes else "the same TP, PP and EP"
    how_many = f"{found.mains.keyed} main params" if found.mains.keyed else "main params"
    if found.mains.buckets:
        how_many = f"main params in {found.mains.buckets} flat buckets"
    state = "NOT those of the model" if found.mains.wrong else "consistent with the model"
    if not found.mains.wrong and found.mains.near:
        state = "near the quantised model" if found.mains.bounded else "not comparable with it"
    if not found.mains.wrong and found.mains.remainders:
        state = "of which the model holds the high bits"
    mains = "the model is the main param" if found.mains.model else f"{how_many}, {state}"
    return f"{found.optimizer} ({sizes}): {mains}; {found.moments} moments"


def _scheduler(scheduler: dict[str, Any] | None) -> str:
    if scheduler is None:
        return "none"
    wanted = ("lr_decay_style", "max_lr", "min_lr", "num_steps", "lr_decay_steps")
    return ", ".join(f"{key} {scheduler[key]}" for key in wanted if key in scheduler)


def _coefficient_lines(places: Iterable[int], decay: MergeCoefficients, unit: str) -> Iterator[str]:
    yield f"{unit:>16}  coefficient  effective LR up to here{'  LR' if decay.lr else ''}"
    multipliers = ["", *(f"{w:.6f}" for w in decay.effective_lr)]
    rates = [f"{'' if lr is None else f'{lr:.4g}':>15}" for lr in decay.lr] or [""] * len(
        multipliers
    )
    for place, coefficient, multiplier, lr in zip(
        places, decay.coefficients, multipliers, rates, strict=True
    ):
        yield f"{place:>16}  {coefficient:>11.6f}  {multiplier:>12}{lr}"


def _source_lines(iterations: Iterable[int], decay: MergeCoefficients) -> Iterator[str]:
    yield from _coefficient_lines(iterations, decay, "iteration")
    yield _unit(decay)


def _unit(decay: MergeCoefficients) -> str:
    why = f": {decay.why_iterations}" if decay.why_iterations else ""
    return f"positions in {decay.unit}{why}"


def _recipe_lines(recipes: Iterable[Recipe]) -> Iterator[str]:
    for recipe in sorted(recipes, key=lambda recipe: (recipe.role.value, recipe.key)):
        for output in recipe.outputs:
            dtype = str(output.dtype).removeprefix("torch.")
            yield f"  {recipe.what:35} {output.key} {dtype} {list(output.shape)}"


def _rank_lines(ranks: Sequence[RankReport]) -> Iterator[str]:
    """Where the time of each rank went; of many ranks, of the slowest ones and their mean."""
    shown = list(ranks)
    if len(shown) > _RANKS_SHOWN:
        yield f"the slowest {_RANKS_SHOWN} of {len(shown)} ranks, and the mean of all:"
        shown = sorted(shown, key=lambda one: one.seconds, reverse=True)[:_RANKS_SHOWN]
    phases = [name for name in PHASES if any(one.phases.get(name, 0.0) > 0.005 for one in ranks)]
    if shown:
        heads = [f"{name + ' s':>12}" for name in phases]
        yield f"{'rank':>5} {'host':16}{'read':>9}{'written':>9}{'speed':>11}{''.join(heads)}"
    for one in shown:
        yield _rank_line(f"{one.rank:>5} {one.host:16.16}", [one], phases)
    if len(ranks) > 1:
        yield _rank_line(f"{'mean':>5} {'':16}", ranks, phases)


def _rank_line(name: str, ranks: Sequence[RankReport], phases: Sequence[str]) -> str:
    """The mean of ranks, or one."""
    read = mean(one.bytes_read for one in ranks)
    written = mean(one.bytes_written for one in ranks)
    speed = f"{size(mean(one.bytes_per_second for one in ranks))}/s"
    seconds = [f"{mean(one.phases.get(phase, 0.0) for one in ranks):>12.2f}" for phase in phases]
    return f"{name}{size(read):>9}{size(written):>9}{speed:>11}{''.join(seconds)}"


def _shape(entry: Any) -> str:
    if not hasattr(entry, "shape"):
        return f"({entry.nbytes} bytes)"
    dtype = str(entry.dtype).removeprefix("torch.")
    return f"{dtype} {list(entry.shape)} in {len(entry.chunks)} chunks"


def _counted(said: CommonSummary) -> str:
    if said.tokens is None:
        return "unknown"
    return f"{said.tokens:,} ({said.consumed_samples:,} samples of {said.seq_length:,})"


def _known(tokens: int | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,}"
