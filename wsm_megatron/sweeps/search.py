"""``search``: the coefficients of a window that score best, from the named decays on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from wsm_megatron.errors import MergeError, UsageError
from wsm_megatron.options import COUNT, TEXT, list_of, option
from wsm_megatron.planning.job import Job
from wsm_megatron.schedule.decay import DECAYS
from wsm_megatron.storage.durable import fsync_path, replace_file
from wsm_megatron.storage.json_file import read_json
from wsm_megatron.sweeps.evaluate import EVALUATION, EvaluationError, EvaluationOptions
from wsm_megatron.sweeps.metric import Metric
from wsm_megatron.sweeps.simplex import RADII, SpentError, minimize
from wsm_megatron.version import __version__

logger = logging.getLogger(__name__)

NAME, FORMAT = "search.json", 1
SEARCH, REPORT = "search", "report"
"""The two splits: what is searched on, and what is reported on."""

Coefficients = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SearchOptions(EvaluationOptions):
    """How coefficients are searched."""

    report: str | None = option(
        "command that scores the best and the named decays on another split, once the search is "
        "done; otherwise as --eval",
        TEXT,
        None,
        group=EVALUATION,
        metavar="CMD",
    )
    budget: int = option(
        "evaluations, those of the named decays among them", COUNT, 60, group=EVALUATION, least=1
    )
    starts: tuple[str, ...] = option(
        "decays that are scored first; the best of them is where the search starts",
        list_of(TEXT),
        DECAYS,
        default_text=",".join(DECAYS),
        group=EVALUATION,
        metavar="SHAPE,...",
    )

    def check(self) -> None:
        super().check()
        if not self.starts or len(set(self.starts)) < len(self.starts):
            raise UsageError("--starts: at least one decay, and none twice")
        if self.budget < len(self.starts):
            raise UsageError(
                f"--budget {self.budget} is less than the {len(self.starts)} decays to start from"
            )


class Evaluator(Protocol):
    """Scores coefficients. All that it raises leaves the search as it is, to be gone on with."""

    def score(self, coefficients: Coefficients, split: str) -> Mapping[str, float]:
        """Metrics of a merge with these coefficients, on a split."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that it knows."""


@dataclass(frozen=True)
class Evaluation:
    """One point of a search.

    Attributes:
        name: of the decay that it is; None for one that was searched.
        scores: on the split of the search. report: on the other one, where it was evaluated.
    """

    coefficients: Coefficients
    name: str | None
    scores: dict[str, float]
    report: dict[str, float] | None = None


@dataclass(frozen=True)
class SearchReport:
    """What was found.

    Attributes:
        iterations: of the sources, oldest first, as all coefficients are.
        evaluations: in the order in which they were asked for.
        remembered: how many of them an earlier search had made.
    """

    metric: Metric
    iterations: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    remembered: int = 0

    @property
    def best(self) -> Evaluation:
        """On the split of the search; of equal ones the first."""
        return min(self.evaluations, key=self._rank)

    @property
    def named(self) -> tuple[Evaluation, ...]:
        """The decays that were started from, best first."""
        named = [one for one in self.evaluations if one.name is not None]
        return tuple(sorted(named, key=self._rank))

    @property
    def frontier(self) -> tuple[tuple[int, Evaluation], ...]:
        """The best so far after so many evaluations, wherever it became better."""
        found: list[tuple[int, Evaluation]] = []
        for n, one in enumerate(self.evaluations, 1):
            if not found or self._rank(one) < self._rank(found[-1][1]):
                found.append((n, one))
        return tuple(found)

    def behind(self, one: Evaluation, split: str = SEARCH) -> float | None:
        """How much worse than the best, on a split; below 0 where it is better. None where one of
        both has no score there."""
        scores, best = (e.scores if split == SEARCH else e.report for e in (one, self.best))
        name = self.metric.name
        if scores is None or best is None or not {name} <= scores.keys() & best.keys():
            return None
        return self.metric.rank(scores[name]) - self.metric.rank(best[name])

    def _rank(self, one: Evaluation) -> float:
        return self.metric.rank(one.scores[self.metric.name])


def search_coefficients(
    job: Job,
    evaluator: Evaluator,
    options: SearchOptions,
    save: Path | None = None,
) -> SearchReport:
    """Score the named decays over a job's sources, and search from the best of them on.

    Args:
        job: of one merge: its sources are the window.
        save: the folder of ``search.json``, which remembers every evaluation: the same call goes
            on from there, and a larger budget goes further. None: nothing is remembered.

    Raises:
        UsageError: scipy is not there; ``search.json`` is of another search.
        EvaluationError: a score is no finite number. Whatever the evaluator raises.
    """
    memory = SearchMemory.there(save, job, options)
    search = _Search(job, evaluator, options, memory)
    search.run()
    return search.report()


class _Search:
    def __init__(
        self, job: Job, evaluator: Evaluator, options: SearchOptions, memory: SearchMemory
    ):
        self._evaluator, self._options, self._memory = evaluator, options, memory
        (output,) = job.outputs
        self._iterations = job.iterations(output)
        checkpoints = output.decay.checkpoints
        self._starts = {
            name: replace(job.config, decay=name).weigh(checkpoints).coefficients
            for name in options.starts
        }
        self._asked: dict[Coefficients, Evaluation] = {}
        self._remembered = 0

    def run(self) -> None:
        needed = len(self._starts) + 2 * len(self._iterations)
        if self._options.budget < needed:
            logger.warning(
                "--budget %d: with %d checkpoints the search knows little before %d evaluations",
                self._options.budget, len(self._iterations), needed,
            )  # fmt: skip
        for name, coefficients in self._starts.items():
            self._ask(coefficients, name)
        with suppress(SpentError):
            for radius in RADII:
                best = self.report().best.coefficients
                minimize(self._searched, best, self._options.budget, radius)
        if REPORT in self._evaluator.splits:
            found = self.report()
            for one in (found.best, *found.named):
                self._report_on(one.coefficients)

    def report(self) -> SearchReport:
        return SearchReport(
            self._options.by, self._iterations, tuple(self._asked.values()), self._remembered
        )

    def _searched(self, coefficients: Coefficients) -> float:
        return self._options.by.rank(self._ask(coefficients, None).scores[self._options.by.name])

    def _ask(self, coefficients: Coefficients, name: str | None) -> Evaluation:
        """A score, which is asked for once. Decays with equal coefficients go by the first name."""
        if (known := self._asked.get(coefficients)) is not None:
            return known
        if len(self._asked) >= self._options.budget:
            raise SpentError
        found = self._memory.found.get(coefficients)
        if found is None:
            found = Evaluation(coefficients, name, self._score(coefficients, SEARCH))
            self._memory.keep(found)
        else:
            self._remembered += 1
        self._asked[coefficients] = found
        return found

    def _report_on(self, coefficients: Coefficients) -> None:
        found = self._asked[coefficients]
        if found.report is None:
            found = replace(found, report=self._score(coefficients, REPORT))
            self._memory.keep(found)
            self._asked[coefficients] = found

    def _score(self, coefficients: Coefficients, split: str) -> dict[str, float]:
        scores = {k: float(v) for k, v in self._evaluator.score(coefficients, split).items()}
        name = self._options.by.name
        if not math.isfinite(scores.get(name, math.nan)):
            raise EvaluationError(
                f"the evaluation on the split {split} gives {scores}, which has no finite {name}; "
                "what is finished is kept"
            )
        return scores


@dataclass
class SearchMemory:
    """``search.json``.

    Attributes:
        identity: of what the scores are: the sources, the commands and the options of the merge.
    """

    path: Path | None
    identity: dict[str, Any]
    found: dict[Coefficients, Evaluation] = field(default_factory=dict)

    @classmethod
    def there(cls, save: Path | None, job: Job, options: SearchOptions) -> SearchMemory:
        identity = _identity(job, options)
        if save is None:
            return cls(None, identity)
        memory = cls(save / NAME, identity)
        if (save / NAME).is_file():
            memory._read(save / NAME)
        return memory

    def keep(self, one: Evaluation) -> None:
        self.found[one.coefficients] = one
        if self.path is None:
            return
        data = {
            "format": FORMAT,
            "wsm_megatron": __version__,
            **self.identity,
            "evaluations": [asdict(one) for one in self.found.values()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (json.dumps(data, indent=1) + "\n").encode())
        fsync_path(self.path.parent)

    def _read(self, path: Path) -> None:
        data = read_json(path)
        try:
            for name, value in self.identity.items():
                if data[name] != value:
                    raise UsageError(
                        f"{path} is of another search: its {name} differs; give another --save, or "
                        "move it away"
                    )
            for one in data["evaluations"]:
                found = Evaluation(tuple(one["coefficients"]), *map(one.get, _FIELDS))
                assert all(map(math.isfinite, found.coefficients)) and found.scores is not None
                self.found[found.coefficients] = found
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise MergeError(
                f"{path} is damaged, or of another version ({type(error).__name__}: {error}); move "
                "it away"
            ) from error


_FIELDS = ("name", "scores", "report")


def _identity(job: Job, options: SearchOptions) -> dict[str, Any]:
    """Plain JSON types."""
    (output,) = job.outputs
    return {
        "sources": output.provenance["sources"],
        "options": {
            name: value
            for name, value in output.provenance["options"].items()
            if name not in ("decay", "min_decay")
        },
        "iterations": list(job.iterations(output)),
        "metric": asdict(options.by),
        "eval": options.eval,
        "report": options.report,
    }
