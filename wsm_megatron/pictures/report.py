"""The report of a run, a sweep and a choice, as sections of one page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.inspection.inspect import RunContents
from wsm_megatron.pictures.coefficients import draw_coefficients
from wsm_megatron.pictures.page import (
    code,
    listing,
    paragraph,
    picture,
    section,
    table,
    write_page,
)
from wsm_megatron.pictures.run import draw_run
from wsm_megatron.pictures.style import as_svg, drawing
from wsm_megatron.pictures.sweep import draw_sweep
from wsm_megatron.pictures.trajectory import draw_trajectory
from wsm_megatron.planning.provenance import read_provenance
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint
from wsm_megatron.sweeps.manifest import SweptMerge
from wsm_megatron.sweeps.metric import LOSS_ALONE
from wsm_megatron.sweeps.selection import Selection
from wsm_megatron.trajectory.record import Trajectory
from wsm_megatron.version import __version__

_ROWS = 20
"""Merges in the table of scores."""
_DRAWN = 5
"""Merges whose coefficients are drawn."""
CITATION = """\
@article{wsm2025,
  title   = {{WSM}: Decay-Free Learning Rate Schedule via Checkpoint Merging
             for {LLM} Pre-training},
  journal = {arXiv preprint arXiv:2507.17634},
  year    = {2025}
}
@software{wsm_megatron,
  title   = {wsm_megatron: checkpoint merging for large-scale pre-training with Megatron},
  version = {%s}
}"""


@dataclass(frozen=True)
class Report:
    """What a page is made of; what is None or empty has no section.

    Attributes:
        merges: of a sweep. selection: how they are ranked. command: that makes the best one.
        run: that they are of.
    """

    title: str
    merges: Sequence[SweptMerge] = ()
    selection: Selection | None = None
    command: str | None = None
    run: RunContents | None = None
    trajectory: Trajectory | None = None

    def write(self, path: Path) -> None:
        """Raises ``UsageError`` where matplotlib is not installed."""
        with drawing():
            write_page(path, self.title, self._subtitle, list(self._sections()))

    @property
    def _subtitle(self) -> str:
        parts = []
        if self.run is not None:
            parts.append(f"{len(self.run.checkpoints)} checkpoints")
        if self.merges:
            parts.append(f"{len(self.merges)} merges")
        return f"{' · '.join([*parts, f'wsm_megatron {__version__}'])}"

    @property
    def _best(self) -> SweptMerge | None:
        if self.selection is None or not self.selection.merges:
            return None
        return self.selection.merges[0].candidate.merge

    @property
    def _trained(self) -> Mapping[int, float]:
        """Scores of trained checkpoints, of the first metric."""
        if self.selection is None:
            return {}
        name = self.selection.metrics[0].name
        return {c.candidate.iteration: c.scores[name] for c in self.selection.checkpoints}

    def _sections(self) -> Iterator[str]:
        if self.selection is not None and self._best is not None:
            yield _choice(self.selection, self._best, self.command, self._trained)
            yield _scores(self.selection, self.merges, self._trained)
        if self.merges:
            yield _coefficients(self._ranked())
        if self.run is not None and self.run.checkpoints:
            yield _run(self.run, self._trained, self.selection)
        if self.trajectory is not None:
            yield _trajectory(self.trajectory)
        if (shown := self._best or next(iter(self.merges), None)) is not None:
            yield _provenance(shown)
        yield section(
            "How to cite",
            paragraph("The paper of the method, and this software:"),
            code(CITATION % __version__),
        )

    def _ranked(self) -> list[SweptMerge]:
        """Best first, where there are scores."""
        if self.selection is None:
            return list(self.merges)
        return [one.candidate.merge for one in self.selection.merges if one.candidate.merge]


def _choice(
    found: Selection, best: SweptMerge, command: str | None, trained: Mapping[int, float]
) -> str:
    metric, scores = found.metrics[0], found.merges[0].scores
    said = [
        ("merge", best.name),
        *((one.name, f"{scores[one.name]:.6g} ({one.way})") for one in found.metrics),
        ("sources", f"{len(best.iterations)}: iterations {_listed(best.iterations)}"),
    ]
    if best.iteration in trained:
        newest = trained[best.iteration]
        change = scores[metric.name] - newest
        said.append((f"newest trained, {metric.name}", f"{newest:.6g} (merge {change:+.4g})"))
    alone = all(one.is_loss for one in found.metrics)
    notes = [paragraph(f"Note: {LOSS_ALONE}.", "note")] if alone else []
    made = [paragraph("It is made by"), code(command)] if command else []
    return section("The best merge", listing(said), *made, *notes)


def _scores(found: Selection, merges: Sequence[SweptMerge], trained: Mapping[int, float]) -> str:
    metric = found.metrics[0]
    scores = {one.candidate.path: one.scores[metric.name] for one in found.merges}
    figure = draw_sweep(merges, scores, metric, trained)
    rows = [
        (
            one.candidate.name,
            *(f"{one.scores[m.name]:.6g}" for m in found.metrics),
            str(len(one.candidate.merge.iterations)) if one.candidate.merge else "",
        )
        for one in found.merges[:_ROWS]
    ]
    head = ("merge", *(m.name for m in found.metrics), "sources")
    more = len(found.merges) - len(rows)
    rest = [paragraph(f"and {more} more", "note")] if more else []
    front = [one.candidate.name for one in found.front]
    if front:
        rest.append(paragraph(f"Pareto front: {', '.join(front)}"))
    if found.missing:
        rest.append(paragraph(f"Without scores: {', '.join(found.missing)}", "note"))
    caption = f"Scores of {len(scores)} merges: {metric.name}, {metric.way}."
    return section("Scores", picture(as_svg(figure), caption), table(head, rows, 0), *rest)


def _coefficients(ranked: Sequence[SweptMerge]) -> str:
    """Of the best merges that have one unit."""
    alike = [one for one in ranked if one.unit == ranked[0].unit]
    drawn: dict[tuple[tuple[int, ...], tuple[float, ...]], SweptMerge] = {}
    for one in alike:
        drawn.setdefault((one.positions, one.coefficients), one)
    chosen = list(drawn.values())[:_DRAWN]
    figure = draw_coefficients([_weighed(one) for one in chosen], [_folder(o) for o in chosen])
    best = chosen[0]
    effective = ["", *(f"{w:.4f}" for w in _weighed(best).effective_lr)]
    rows = [
        (str(i), f"{p:,}", f"{c:.6f}", w)
        for i, p, c, w in zip(
            best.iterations, best.positions, best.coefficients, effective, strict=True
        )
    ]
    head = ("iteration", best.unit, "coefficient", "effective LR up to here")
    caption = "Effective learning rate, and the coefficients that make it"
    caption += f", of {len(chosen)} merges." if len(chosen) > 1 else "."
    return section(
        "Coefficients", picture(as_svg(figure), caption), paragraph(best.name), table(head, rows)
    )


def _run(run: RunContents, trained: Mapping[int, float], found: Selection | None) -> str:
    metric = found.metrics[0].name if found is not None else "loss"
    figure = draw_run(run, trained, metric)
    marks = [f"iteration {one.iteration}: {mark}" for one in run.checkpoints for mark in one.marks]
    remarks = [paragraph(mark, "warning") for mark in marks[:_ROWS]]
    caption = f"Learning rate of {run.path} over what was trained"
    caption += f", and {metric} of its checkpoints." if trained else "."
    return section("The run", picture(as_svg(figure), caption), *remarks)


def _trajectory(found: Trajectory) -> str:
    geometry = found.weights
    drift, walk, jitter = found.variance.shares
    warnings = [paragraph(one, "warning") for one in found.warnings()]
    steps = ["", *(f"{step:.5g}" for step in geometry.steps)]
    cosines = ["", *(f"{one:+.3f}" for one in geometry.cosines), ""]
    rows = [
        (str(point.iteration), f"{norm:.6g}", step, cosine, f"{mean:.5g}")
        for point, norm, step, cosine, mean in zip(
            found.points, geometry.norms, steps, cosines, geometry.to_mean, strict=False
        )
    ]
    decays = [
        (one.decay, f"{one.averaged_away:.1%}", f"{one.progress_kept:.1%}", f"{one.distance:.2f}")
        for one in found.decayed()
    ]
    caption = (
        f"The path of {len(found.points)} checkpoints. A mean squared update is {drift:.0%} drift, "
        f"{walk:.0%} random walk and {jitter:.0%} jitter."
    )
    return section(
        "The path",
        *warnings,
        picture(as_svg(draw_trajectory(found)), caption),
        table(("iteration", "norm", "step", "cosine of steps", "to the mean"), rows),
        table(("decay", "noise averaged away", "progress kept", "steps from the newest"), decays),
    )


def _provenance(one: SweptMerge) -> str:
    path = Path(one.path)
    said = [
        ("checkpoint", one.path if one.exists else f"{one.path} (not on disk)"),
        ("digest", one.digest),
        ("decay", one.decay or "weights given"),
        ("order", one.order),
        ("positions", one.unit),
        *(("source", source) for source in one.sources),
    ]
    recorded = read_provenance(path) if path.is_dir() else None
    options: list[str] = []
    if recorded is not None:
        said += [(name, str(version)) for name, version in recorded.get("versions", {}).items()]
        given = {name: value for name, value in recorded["options"].items() if value not in _UNSET}
        options = [paragraph("Options, as wsm_merge.json has them:"), code(json.dumps(given))]
    return section("Where it comes from", listing(said), *options)


_UNSET: tuple[Any, ...] = (None, False, [], 0)


def _weighed(one: SweptMerge) -> MergeCoefficients:
    return MergeCoefficients(
        checkpoints=tuple(map(Checkpoint, one.iterations)),
        decay=one.decay,
        positions=one.positions,
        unit=one.unit,
        coefficients=one.coefficients,
        why_iterations=None,
    )


def _folder(one: SweptMerge) -> str:
    """Its folder within the sweep, and its end where that is needed."""
    return one.name.rpartition("/")[0] or one.name


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    if len(numbers) <= most:
        return ", ".join(map(str, numbers))
    first, last = numbers[: most // 2], numbers[-most // 2 :]
    return ", ".join([*map(str, first), "…", *map(str, last)])
