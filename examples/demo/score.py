"""Held-out losses of a sweep's merges and of its sources, as CSV: an evaluator of ``wsm select``.

python -m examples.demo.score demo-out/sweep/sweep.json > scores.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

from examples.cpu_ranks import run_ranks
from examples.demo.ranks import held_out_losses

_RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo.score", description=__doc__)
    parser.add_argument("manifest", type=Path)
    found = _checkpoints(parser.parse_args().manifest)
    places = [(path.parent, iteration) for path, iteration in found.items()]
    with tempfile.TemporaryDirectory() as logs:
        losses = run_ranks(held_out_losses, _RANKS, Path(logs), timeout=3600, checkpoints=places)[0]
    writer = csv.writer(sys.stdout)
    writer.writerow(["path", "loss"])
    writer.writerows(zip(map(str, found), losses, strict=True))


def _checkpoints(manifest: Path) -> dict[Path, int]:
    """Merges that are on disk, and the checkpoints that they are of."""
    merges = json.loads(manifest.read_text())["merges"]
    found = {Path(one["path"]): one["iteration"] for one in merges if one["exists"]}
    for one in merges:
        found |= zip(map(Path, one["sources"]), one["iterations"], strict=True)
    return found


if __name__ == "__main__":
    main()
