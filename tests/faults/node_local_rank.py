"""One rank of a merge of node-local sources, in which a look at the run or a message can go wrong.

In a module of its own, as every rank imports it.
"""

from __future__ import annotations

from pathlib import Path

from tests.faults import rank as faults
from tests.faults.rank import Case
from wsm_megatron.access.node_local import inventory, transport


def run_rank(
    case: Case | None, rank: int, size: int, port: int, log: Path, argv: list[str]
) -> None:
    """As :func:`tests.faults.rank.run_rank`, with two more stages."""
    faults._PLACES.update({"look": (inventory, "_see"), "transfer": (transport.Transport, "_wait")})
    faults.run_rank(case, rank, size, port, log, argv)
