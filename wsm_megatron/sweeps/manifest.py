"""``OUT/sweep.json``: the merges of a sweep, what each is made of, and how each was scored.

An evaluator walks ``merges`` and loads ``path`` of every one that ``exists``. The file is written
whole and atomically, after every step of a sweep; a sweep goes on from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import MergeError
from wsm_megatron.planning.job import Job, OutputCheckpoint
from wsm_megatron.planning.staging_key import merge_digest
from wsm_megatron.schedule.decay import effective_lr
from wsm_megatron.schedule.order import SCRAMBLED
from wsm_megatron.storage.durable import fsync_path, replace_file
from wsm_megatron.storage.json_file import read_json
from wsm_megatron.version import __version__

NAME = "sweep.json"
FORMAT = 1
_WINDOW = ("from_", "to", "last", "window_iterations", "window_tokens", "every", "min_interval",
           "min_checkpoints", "iterations")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SweptMerge:
    """One merge of a sweep.

    Attributes:
        name: of its folder and checkpoint, within the sweep's.
        path: its checkpoint, absolute.
        root: the folder to ``--load``, of which ``iteration`` is the ``--ckpt-step``.
        iterations: of its sources, oldest first; ``coefficients``, ``positions`` (in ``unit``) and
            ``sources`` (paths) are in that order, ``effective_lr`` one shorter.
        decay: None for explicit coefficients.
        window: the options that chose the sources, as far as they were given.
        exists: it is on disk. export: where its export is, if it has one.
        digest: of what is merged and how: another one is another merge.
        scores: by metric; None before it was evaluated.
    """

    name: str
    path: str
    root: str
    iteration: int
    iterations: tuple[int, ...]
    coefficients: tuple[float, ...]
    decay: str | None
    min_decay: float
    order: str
    order_seed: int | None
    window: dict[str, Any]
    positions: tuple[int, ...]
    unit: str
    sources: tuple[str, ...]
    digest: str
    exists: bool = False
    export: str | None = None
    scores: dict[str, float] | None = None

    @property
    def on_disk(self) -> bool:
        """As a checkpoint or an export."""
        return self.exists or self.export is not None

    @classmethod
    def of(cls, job: Job, output: OutputCheckpoint, config: MergeConfig, save: Path) -> SweptMerge:
        path, root = output.path.absolute(), output.root.absolute()
        return cls(
            name=str(path.relative_to(save.absolute())),
            path=str(path),
            root=str(root),
            iteration=output.iteration,
            iterations=job.iterations(output),
            coefficients=output.decay.coefficients,
            decay=output.decay.decay,
            min_decay=config.min_decay,
            order=config.order,
            order_seed=config.order_seed if config.order == SCRAMBLED else None,
            window=_window(config, output.iteration),
            positions=output.decay.positions,
            unit=output.decay.unit,
            sources=tuple(str(job.sources[j].path.absolute()) for j in output.source_indices),
            digest=merge_digest(job, output),
        )

    def as_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "effective_lr": effective_lr(self.coefficients)}


@dataclass(frozen=True)
class SweepManifest:
    """What ``sweep.json`` in a folder holds."""

    save: Path
    merges: tuple[SweptMerge, ...] = field(default=())

    @property
    def path(self) -> Path:
        return self.save / NAME

    @classmethod
    def read(cls, path: Path) -> SweepManifest:
        """Raises ``MergeError`` for a file that is damaged, or not there."""
        data = read_json(path)
        try:
            if data["format"] != FORMAT:
                raise MergeError(f"{path}: format {data['format']}, of another version")
            return cls(path.parent, tuple(map(_merge_of, data["merges"])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MergeError(
                f"{path} is damaged, or no manifest of a sweep ({type(error).__name__}: {error}); "
                "move it away, and the same sweep writes it again"
            ) from error

    @classmethod
    def there(cls, save: Path) -> SweepManifest:
        """The one in a folder; an empty one where there is none."""
        path = save / NAME
        return cls.read(path) if path.is_file() else cls(save)

    def with_planned(self, planned: Iterable[SweptMerge]) -> SweepManifest:
        """With the merges of a sweep added; of those that are known the scores stay."""
        known = {one.path: one for one in self.merges}
        for one in planned:
            before = known.get(one.path)
            if before is not None and before.digest == one.digest:
                there = before.export is not None and Path(before.export).is_dir()
                one = replace(
                    one,
                    exists=Path(one.path).is_dir(),
                    export=before.export if there else None,
                    scores=before.scores,
                )
            known[one.path] = one
        return replace(self, merges=tuple(known.values()))

    def updated(self, path: str, **values: Any) -> SweepManifest:
        """With other values of one merge."""
        merges = (replace(one, **values) if one.path == path else one for one in self.merges)
        return replace(self, merges=tuple(merges))

    def write(self) -> None:
        """Atomically and durably."""
        self.save.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, self._text().encode())
        fsync_path(self.save)

    def _text(self) -> str:
        """JSON with a line for every value: lists of sources are long."""
        merges = (
            ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in one.as_data().items())
            for one in self.merges
        )
        listed = ",\n".join(f"  {{\n{merge}\n  }}" for merge in merges)
        head = f'{{\n "format": {FORMAT},\n "wsm_megatron": {json.dumps(__version__)},\n'
        return f'{head} "merges": [\n{listed}\n ]\n}}\n'


def _window(config: MergeConfig, end: int) -> dict[str, Any]:
    """Of the window's options those that were given, and its end."""
    given = {name.strip("_"): getattr(config, name) for name in _WINDOW}
    said = {name: value for name, value in given.items() if value is not None}
    for name in ("window_iterations", "window_tokens"):
        if name in said:
            (said[name],) = said[name]
    return said | {"to": end}


def _merge_of(data: Mapping[str, Any]) -> SweptMerge:
    data = {"export": None, **data}  # which an earlier version did not know
    values = {name: data[name] for name in SweptMerge.__dataclass_fields__}
    for name in ("iterations", "coefficients", "positions", "sources"):
        values[name] = tuple(values[name])
    scores = values["scores"]
    numbers = [*values["coefficients"], *(scores.values() if scores is not None else ())]
    texts = [values[name] for name in ("path", "name", "root", "digest")] + [*values["sources"]]
    if len(values["coefficients"]) != len(values["iterations"]):
        raise ValueError("as many coefficients as iterations are wanted")
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ValueError("a coefficient or score is no finite number")
    texts += [] if values["export"] is None else [values["export"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a path is no text")
    return SweptMerge(**values)
