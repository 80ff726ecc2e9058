"""What the data says, by model and seed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from examples.wsm_vs_wsd.profile import Profile
from examples.wsm_vs_wsd.record import profile_of
from examples.wsm_vs_wsd.statistics import Interval, interval, paired


@dataclass(frozen=True)
class Results:
    """All arms that are done.

    Attributes:
        data: as record.py collects it.
    """

    data: dict[str, Any]

    @cached_property
    def profile(self) -> Profile:
        return profile_of(self.data)

    @cached_property
    def _rows(self) -> dict[tuple[str, str], dict[int, float]]:
        """Values by (model, metric) and seed."""
        rows: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        for arm in self.data["arms"].values():
            for row in arm["rows"]:
                for metric, value in row.items():
                    if metric != "name":
                        rows[row["name"], metric][arm["seed"]] = value
        return dict(rows)

    def values(self, name: str, metric: str = "test") -> dict[int, float]:
        """By seed; empty for a model that no arm has made."""
        return self._rows.get((name, metric), {})

    def mean(self, name: str, metric: str = "test") -> Interval | None:
        values = self.values(name, metric)
        return interval(list(values.values())) if values else None

    def difference(self, name: str, other: str, metric: str = "test") -> Interval | None:
        """Paired; None where no seed has both."""
        one, two = self.values(name, metric), self.values(other, metric)
        return paired(one, two) if one.keys() & two.keys() else None

    def selected(self, names: list[str]) -> dict[int, str]:
        """For each seed that has them all, the model that is best on the validation split."""
        columns = [self.values(name, "validation") for name in names]
        seeds = set.intersection(*(set(column) for column in columns)) if columns else set()
        return {
            seed: min(zip(columns, names, strict=True), key=lambda pair: pair[0][seed])[1]
            for seed in sorted(seeds)
        }

    def selected_values(self, names: list[str]) -> dict[int, float]:
        """Test losses of what the validation split selected."""
        return {seed: self.values(name)[seed] for seed, name in self.selected(names).items()}

    def records(self, kind: str) -> list[dict[str, Any]]:
        """``distances`` or ``variances`` of all arms, with their seeds."""
        return [
            {"seed": arm["seed"], **one}
            for arm in self.data["arms"].values()
            for one in arm.get(kind, [])
        ]

    def arms(self, end: str) -> dict[int, dict[str, Any]]:
        """By seed, those whose name is the seed's and ``end``."""
        arms = self.data["arms"]
        return {arm["seed"]: arm for name, arm in arms.items() if name == f"s{arm['seed']}-{end}"}
