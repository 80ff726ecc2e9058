"""A file of scores, of any harness: checkpoint or merge → metrics.

CSV: a header, then a line for each; the column ``path``, ``merge``, ``checkpoint``, ``name`` or
``iteration`` says of what, or else the first one. JSON: an object of objects,
``{"NAME": {"loss": 1.25}}``, or a list of objects with one of these names in them.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.errors import UsageError, some
from wsm_megatron.sweeps.metric import Metric

KEYS = ("path", "merge", "checkpoint", "name", "iteration")
"""What the column that says of what the scores are may be called."""


@dataclass(frozen=True)
class ScoreLine:
    """Scores of one checkpoint or merge, as it is called in a file.

    Attributes:
        where: file and place, for messages.
        values: by column, as they stand there.
    """

    key: str
    where: str
    values: Mapping[str, Any]

    def scores(self, metrics: Sequence[Metric]) -> dict[str, float]:
        """The metrics that it has. Raises ``UsageError`` for one that is no finite number."""
        found = {}
        for metric in metrics:
            value = self.values.get(metric.name)
            if value is None or value == "":
                continue
            found[metric.name] = self._number(metric.name, value)
        return found

    def _number(self, name: str, value: Any) -> float:
        number = math.nan
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = math.nan
        if not math.isfinite(number):
            raise UsageError(f"{self.where}: {name} of {self.key} is {value!r}, no finite number")
        return number


def read_scores(path: Path, metrics: Sequence[Metric]) -> list[ScoreLine]:
    """All lines of a file of scores.

    Raises:
        UsageError: it cannot be read, is neither CSV nor JSON, or has none of the metrics.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--scores {path}: {getattr(error, 'strerror', None) or error}") from error
    is_json = path.suffix == ".json" or text.lstrip()[:1] in ("{", "[")
    lines = list(_json_lines(path, text) if is_json else _csv_lines(path, text))
    if not lines:
        raise UsageError(f"--scores {path}: there are no scores in it")
    columns = dict.fromkeys(name for line in lines for name in line.values)
    for metric in metrics:
        if metric.name not in columns:
            raise UsageError(f"--scores {path}: no {metric.name} in it: {some(list(columns), 20)}")
    return lines


def _csv_lines(path: Path, text: str) -> Iterable[ScoreLine]:
    reader = csv.reader(text.splitlines())
    try:
        rows = [(reader.line_num, [c.strip() for c in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise UsageError(f"--scores {path}: not CSV: {error}") from error
    if not rows:
        return
    head = rows[0][1]
    if len(set(head)) < len(head):
        raise UsageError(f"--scores {path}: two columns have one name: {', '.join(head)}")
    lowered = [name.lower() for name in head]
    at = next((lowered.index(key) for key in KEYS if key in lowered), 0)
    for number, row in rows[1:]:
        where = f"--scores {path}, line {number}"
        if len(row) != len(head):
            raise UsageError(f"{where}: {len(row)} values under {len(head)} names of columns")
        values = dict(zip(head, row, strict=True))
        yield ScoreLine(values.pop(head[at]), where, values)


def _json_lines(path: Path, text: str) -> Iterable[ScoreLine]:
    where = f"--scores {path}"
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from error
    if isinstance(data, dict):
        pairs = list(data.items())
    elif isinstance(data, list):
        pairs = [(_key_of(one, where), one) for one in data]
    else:
        raise UsageError(f"{where}: neither an object nor a list")
    for key, values in pairs:
        if not isinstance(values, dict):
            raise UsageError(f'{where}: {key}: expected an object such as {{"loss": 1.25}}')
        yield ScoreLine(str(key), where, values)


def _key_of(one: Any, where: str) -> str:
    if isinstance(one, dict):
        for key in KEYS:
            if key in one:
                return str(one.pop(key))
    raise UsageError(f"{where}: {json.dumps(one)[:80]} does not say of what: {', '.join(KEYS)}")


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UsageError(f"{where}: {name} is there twice")
        found[name] = value
    return found
