"""A metric, and which way is better. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from wsm_megatron.errors import UsageError

_LOWER = re.compile(r"loss|ppl|perplex|nll|bpb|bits|nats|error|entropy|violation|\bce\b", re.I)
_WAYS = {"min": True, "max": False}

LOSS_ALONE = (
    "a loss alone can rank merges wrongly: in Table 5 of the WSM paper the merge has the higher LM "
    "loss (0.697 against 0.675) and the better benchmarks; score what you ship for, too"
)


@dataclass(frozen=True)
class Metric:
    """A column of scores.

    Attributes:
        lower: lower is better.
    """

    name: str
    lower: bool

    @classmethod
    def of(cls, text: str) -> Metric:
        """``loss``, or ``NAME:min`` or ``NAME:max``. Losses, perplexities and errors are better
        when they are lower; everything else when it is higher."""
        name, colon, way = text.rpartition(":")
        if colon and way in _WAYS:
            return cls(_named(name, text), _WAYS[way])
        return cls(_named(text, text), bool(_LOWER.search(text)))

    @property
    def is_loss(self) -> bool:
        return bool(_LOWER.search(self.name))

    @property
    def way(self) -> str:
        return "lower is better" if self.lower else "higher is better"

    def rank(self, value: float) -> float:
        """To sort by: smaller is better."""
        return value if self.lower else -value


def _named(name: str, text: str) -> str:
    if not name:
        raise UsageError(f"--metric {text}: no name of a metric")
    return name


def metrics_of(text: str) -> tuple[Metric, ...]:
    """``loss`` or ``loss,mmlu``.

    Raises ``UsageError`` for an empty name, or one twice.
    """
    found = tuple(Metric.of(one.strip()) for one in text.split(","))
    if len({one.name for one in found}) < len(found):
        raise UsageError(f"--metric {text} names a metric twice")
    return found
