"""From scores to a choice: the best merges, the Pareto front, and the best source checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wsm_megatron.checkpoint.run_directory import checkpoint_name, scan_run
from wsm_megatron.errors import UsageError, some
from wsm_megatron.sweeps.manifest import SweepManifest, SweptMerge
from wsm_megatron.sweeps.metric import Metric
from wsm_megatron.sweeps.scores import ScoreLine, read_scores

_MERGE, _SOURCE = "merge", "checkpoint"


@dataclass(frozen=True)
class Candidate:
    """What can be scored: a merge of a sweep, or a trained checkpoint.

    Attributes:
        merge: None for a checkpoint.
        names: what it may be called in a file of scores.
    """

    path: str
    iteration: int
    merge: SweptMerge | None
    names: frozenset[str]

    @property
    def name(self) -> str:
        return self.path if self.merge is None else self.merge.name


@dataclass(frozen=True)
class Scored:
    """A candidate with its scores, of all metrics that were asked for."""

    candidate: Candidate
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Selection:
    """What the scores say.

    Attributes:
        merges: best first, by the first metric. checkpoints: the same of trained ones.
        front: merges that no other is better than in one metric and as good in the other; empty
            for one metric.
        missing: names of merges without a score of all metrics.
        top: iterations of the best checkpoints, oldest first: sources of a merge.
    """

    metrics: tuple[Metric, ...]
    merges: tuple[Scored, ...]
    checkpoints: tuple[Scored, ...]
    front: tuple[Scored, ...]
    missing: tuple[str, ...]
    top: tuple[int, ...] = field(default=())


def select_merges(
    metrics: Sequence[Metric],
    scores: Sequence[Path],
    manifest: Path | None = None,
    load: Path | None = None,
    top: int = 32,
) -> Selection:
    """Rank the merges of a sweep, and checkpoints, by their scores.

    Args:
        metrics: one, or two, which also give a Pareto front.
        scores: files (:mod:`.scores`); without any, scores that the sweep itself has made.
        manifest: a sweep's. load: a run whose checkpoints have scores. One of both is needed.
        top: how many checkpoints make a list of sources.

    Raises:
        UsageError: scores of something unknown, one twice, one that is no finite number; or none.
        MergeError: the manifest is damaged.
    """
    candidates = list(_candidates(manifest, load))
    if not 1 <= len(metrics) <= 2:
        raise UsageError("--metric: one name, or two for a Pareto front")
    found = _own_scores(candidates, metrics)
    found = _combined(found, _from_files(candidates, metrics, scores))
    complete = [
        Scored(one, values)
        for one in candidates
        if len(values := found.get(one.path, {})) == len(metrics)
    ]
    if not complete:
        names = " and ".join(metric.name for metric in metrics)
        raise UsageError(f"nothing has a score of {names}; give --scores FILE")
    first = metrics[0]
    ranked = sorted(complete, key=lambda one: first.rank(one.scores[first.name]))
    merges = tuple(one for one in ranked if one.candidate.merge is not None)
    sources = tuple(one for one in ranked if one.candidate.merge is None)
    known = {one.candidate.path for one in complete}
    return Selection(
        tuple(metrics),
        merges,
        sources,
        tuple(pareto_front(merges, metrics)) if len(metrics) == 2 else (),
        tuple(c.name for c in candidates if c.merge is not None and c.path not in known),
        tuple(sorted(one.candidate.iteration for one in sources[:top])),
    )


def pareto_front(scored: Sequence[Scored], metrics: Sequence[Metric]) -> list[Scored]:
    """Those that no other dominates: at least as good in both metrics, and better in one. Of equal
    ones all stay. In the order of the first metric."""
    first, second = metrics
    places = [
        (first.rank(one.scores[first.name]), second.rank(one.scores[second.name]), one)
        for one in scored
    ]
    front = [
        (x, y, one)
        for x, y, one in places
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in places)
    ]
    return [one for *_, one in sorted(front, key=lambda place: place[:2])]


def _candidates(manifest: Path | None, load: Path | None) -> Iterable[Candidate]:
    """All merges, and the checkpoints that they are of, or that a run has."""
    if manifest is None and load is None:
        raise UsageError("give --manifest OUT/sweep.json, --load RUN, or both")
    sources: dict[str, int] = {}
    if load is not None:
        run = scan_run(load)
        sources |= {str(run.checkpoint(i).absolute()): i for i in run.finished}
    if manifest is not None:
        if not manifest.is_file():
            raise UsageError(f"--manifest {manifest}: no such file")
        swept = SweepManifest.read(manifest)
        alone = [one.root for one in swept.merges]
        for one in swept.merges:
            names = {one.path, one.name, _real(one.path)}
            names |= {one.export, _real(one.export)} if one.export is not None else set()
            if alone.count(one.root) == 1:
                names |= {one.root, str(Path(one.name).parent)}
            yield Candidate(one.path, one.iteration, one, frozenset(names))
            sources |= dict(zip(one.sources, one.iterations, strict=True))
    for path, iteration in sources.items():
        numbers = {str(iteration), checkpoint_name(iteration)}
        if list(sources.values()).count(iteration) > 1:  # of two runs
            numbers = set()
        yield Candidate(path, iteration, None, frozenset({path, _real(path), *numbers}))


def _own_scores(
    candidates: Iterable[Candidate], metrics: Sequence[Metric]
) -> dict[str, dict[str, float]]:
    """Scores that the sweep has made itself."""
    names = {metric.name for metric in metrics}
    return {
        one.path: {name: value for name, value in one.merge.scores.items() if name in names}
        for one in candidates
        if one.merge is not None and one.merge.scores is not None
    }


def _from_files(
    candidates: Sequence[Candidate], metrics: Sequence[Metric], files: Sequence[Path]
) -> dict[str, dict[str, float]]:
    """Scores by path. Raises ``UsageError`` for what is unknown, or there twice."""
    named = {name: one for one in candidates for name in one.names}
    found: dict[str, dict[str, float]] = {}
    unknown: list[str] = []
    for file in files:
        there = [one for one in metrics if len(files) == 1 or _has(file, one)]
        for line in read_scores(file, there):
            one = _find(line, named.get)
            if one is None:
                unknown.append(line.key)
                continue
            known = found.setdefault(one.path, {})
            for name, value in line.scores(there).items():
                if name in known:
                    raise UsageError(f"{line.where}: {name} of {one.name} is there twice")
                known[name] = value
    if unknown:
        raise UsageError(
            f"--scores {', '.join(map(str, files))}: {some(unknown, 5)}: neither a merge of the "
            "manifest nor a checkpoint of its run; names are those of sweep.json (path or name), "
            "and iterations"
        )
    return found


def _has(file: Path, metric: Metric) -> bool:
    return any(metric.name in line.values for line in read_scores(file, ()))


def _find(line: ScoreLine, known: Callable[[str], Candidate | None]) -> Candidate | None:
    key = line.key.rstrip("/")
    return known(key) or known(_real(key))


def _combined(
    own: dict[str, dict[str, float]], given: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Both; what is given in files wins."""
    return {path: own.get(path, {}) | given.get(path, {}) for path in own.keys() | given.keys()}


def _real(path: str) -> str:
    return os.path.realpath(path)
