"""What is checked of a source once all ranks have read it."""

from __future__ import annotations

from collections.abc import Sequence

from wsm_megatron.checkpoint.reader import CheckpointReader, Ledger
from wsm_megatron.planning.sources import Source
from wsm_megatron.storage.fingerprint import check_unchanged


def check_source(source: Source, ledgers: Sequence[Ledger]) -> None:
    """Compare records that were read in parts, and files that may have changed meanwhile.

    Args:
        ledgers: of ranks that read the source.

    Raises:
        MergeError: a record is damaged, or the checkpoint changed.
    """
    reader = CheckpointReader(source.layout)
    try:
        reader.verify(ledgers)
    finally:
        reader.close()
    if source.fingerprint:  # of files that this rank sees
        check_unchanged(source.path, source.fingerprint)
