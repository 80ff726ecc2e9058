"""``wsm verify`` of a merged checkpoint against raw reading of its bytes, in one run: one table.

    python benchmarks/verify.py [--checkpoints 3] [--gib 1] [--repeat 3]

Rows: seconds, GB/s of the merge's files, and the ratio to the floor (``cat`` of them into
/dev/null), the page cache warm. The second row also makes the merge again from its sources
(``--sources all``), whose bytes are part of its floor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from generate import add_arguments, generate
from measure import launch, merge, raw_read, where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.set_defaults(checkpoints=3)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wsm-bench-") as folder:
        run, out = Path(folder, "run"), Path(folder, "out")
        generate(run, given.checkpoints, given.gib, given.moe, given.tp, given.optimizer)
        merge(run, out, 1)
        measure(sorted(run.glob("iter_*/*.distcp")), out, given.repeat)


def measure(sources: list[Path], out: Path, repeat: int) -> None:
    (merged,) = out.glob("iter_*")
    files = sorted(path for path in merged.rglob("*") if path.is_file())
    cases = {
        "verify": ([], files),
        "verify --sources all": (["--sources", "all"], [*files, *sources]),
    }
    floors, seconds = ({name: list[float]() for name in cases} for _ in range(2))
    peaks = dict.fromkeys(cases, 0)
    for _ in range(repeat):
        for name, (options, read) in cases.items():
            floors[name].append(raw_read(read))
            done = launch(["-m", "wsm_megatron", "verify", str(merged), *options])
            seconds[name].append(done.seconds)
            peaks[name] = max(peaks[name], done.peak)
    print(where())
    print("| | bytes | seconds | GB/s | x floor | peak MiB |\n|---|---|---|---|---|---|")
    for name, (_, read) in cases.items():
        nbytes = sum(path.stat().st_size for path in read)
        took, floor = (statistics.median(of[name]) for of in (seconds, floors))
        print(
            f"| {name} | {nbytes / 1e9:.2f} GB | {took:.2f} | {nbytes / took / 1e9:.2f} | "
            f"{took / floor:.1f} | {peaks[name] / 2**20:.0f} |"
        )


if __name__ == "__main__":
    main()
