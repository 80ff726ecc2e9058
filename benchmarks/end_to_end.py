"""A merge against raw reading plus writing of the same bytes, in one run: one table.

    python benchmarks/end_to_end.py [--checkpoints 8] [--gib 1] [--ranks 1,2] [--repeat 3]

Rows: seconds, GB/s and the ratio to the floor (``cat`` of the sources' files into /dev/null, then
writing and syncing as many bytes as the merged checkpoint has), all with the page cache warm, and
the peak resident memory of a rank. Ours starts its ranks itself (``--local-ranks``), the reference
tool's are started as by srun, without a launcher's time. Four merges of the same sources show what
a further merge costs. Where ``MEGATRON_LM_DIR`` names a checkout with
``tools/checkpoint/weighted_merge.py``, that tool merges the same files in turn with ours, and the
two outputs are compared. Options that this script does not know go to ``wsm merge``:
``--device cuda``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from generate import add_arguments, generate
from measure import Run, launch, merge, raw_read, raw_write, where

FOUR = "mean,linear,1-sqrt,ema"
UNWRITTEN = str(Path(__file__).with_name("unwritten.py"))


def reference_tool() -> Path | None:
    """Megatron-LM's own merge tool, where a checkout has it."""
    root = os.environ.get("MEGATRON_LM_DIR")
    tool = Path(root) / "tools/checkpoint/weighted_merge.py" if root else None
    return tool if tool and tool.is_file() else None


def reference_command(tool: Path, run: Path, out: Path) -> list[str]:
    last = int((run / "latest_checkpointed_iteration.txt").read_text())
    options = ["--merge-inputs", str(run), "--start-checkpoint", "1000"]
    options += ["--end-checkpoint", str(last), "--merge-output", str(out)]
    return [str(tool), *options]


def compare(left: Path, right: Path) -> str:
    """How two merged checkpoints of bf16 tensors differ, as PyTorch loads them."""
    elements = different = 0
    worst = 0.0
    ours, theirs = load_model(left), load_model(right)
    assert ours.keys() == theirs.keys(), "not the same tensors"
    for key, tensor in ours.items():
        elements += tensor.numel()
        different += int((tensor != theirs[key]).sum())
        difference = (tensor.float() - theirs[key].float()).abs() / tensor.float().abs()
        worst = max(worst, float(difference.nan_to_num().max()))
    return (
        f"{different} of {elements} elements differ from the reference tool's (float32 "
        f"accumulation), by at most {worst:.2g} of their value"
    )


def load_model(path: Path) -> dict[str, torch.Tensor]:
    reader = dcp.FileSystemReader(path)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


class Table:
    """Medians of rounds, in the order of their first appearance."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[float, int, int]]] = {}

    def add(self, name: str, seconds: float, moved: int, peak: int = 0) -> None:
        self._rows.setdefault(name, []).append((seconds, moved, peak))

    def median(self, name: str) -> float:
        return statistics.median(row[0] for row in self._rows[name])

    def show(self, floor: float) -> None:
        print("| | seconds | GB/s | x floor | peak MiB |\n|---|---|---|---|---|")
        for name, rows in self._rows.items():
            seconds = self.median(name)
            peak = max(row[2] for row in rows)
            rate = f"{rows[0][1] / seconds / 1e9:.2f}"
            shown = f"{peak / 2**20:.0f}" if peak else ""
            print(f"| {name} | {seconds:.2f} | {rate} | {seconds / floor:.2f} | {shown} |")


def ours(table: Table, run: Path, out: Path, ranks: int, name: str, options: list[str]) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    done = merge(run, out, ranks, *options)
    moved = done.report["bytes_read"] + done.report["bytes_written"]
    table.add(name, done.seconds, moved, done.peak)
    table.add(f"{name}: without start and end of Python", done.report["seconds"], moved)
    return done


def apart_from_writing(run: Path, repeat: int, options: list[str]) -> str:
    """Seconds that threads read and reduce, for one merge and for four, on one rank.

    Nothing is written: writing beside it would slow the reading down.
    """
    found: dict[str, list[float]] = {"mean": [], FOUR: []}
    for _ in range(repeat):
        for decays, seconds in found.items():
            with tempfile.TemporaryDirectory(prefix="wsm-bench-") as folder:
                command = ["--load", str(run), "--save", folder, "--json", "--decay", decays]
                done = launch([UNWRITTEN, *command, *options])
            phases = done.report["ranks"][0]["phases"]
            seconds.append(phases["reading"] + phases["reducing"])
    one, four = (statistics.median(seconds) for seconds in found.values())
    return (
        f"reading and reducing, nothing written: 4 merges {four:.2f} s, one {one:.2f} s, "
        f"{four / one:.2f} times"
    )


def measure(run: Path, scratch: Path, ranks: list[int], repeat: int, options: list[str]) -> None:
    files = sorted(run.glob("iter_*/*.distcp"))
    size = sum(file.stat().st_size for file in files)
    tool, compared, table = reference_tool(), "", Table()
    raw_read(files)
    print(where())
    print(f"{len(files)} files, {size / 1e9:.2f} GB; medians of {repeat} rounds")
    written = 0
    for _ in range(repeat):
        for count in ranks:
            of = f"{count} rank" + "s" * (count > 1)
            decays = ["--decay", FOUR, *options]
            ours(table, run, scratch / "four", count, f"4 merges, {of}", decays)
            done = ours(table, run, scratch / "out", count, f"wsm merge, {of}", options)
            written = done.report["bytes_written"]
            if tool is not None:
                other = scratch / "reference"
                theirs = launch(reference_command(tool, run, other), count)
                table.add(f"reference tool, {of}", theirs.seconds, size + written, theirs.peak)
                name = Path(done.report["output"]).name
                compared = compared or compare(scratch / "out" / name, other / name)
                shutil.rmtree(other)
        table.add("cat", raw_read(files), size)
        table.add("raw write and sync", raw_write(scratch, written), written)
    table.show(table.median("cat") + table.median("raw write and sync"))
    print(apart_from_writing(run, repeat, options))
    if compared:
        print(compared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="where the run is, or is generated")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--repeat", type=int, default=3)
    add_arguments(parser)
    given, options = parser.parse_known_args()
    ranks = [int(part) for part in given.ranks.split(",")]
    with tempfile.TemporaryDirectory(prefix="wsm-bench-") as folder:
        run = given.run or Path(folder) / "run"
        generate(run, given.checkpoints, given.gib, given.moe, given.tp, given.optimizer)
        measure(run, Path(folder), ranks, given.repeat, options)


if __name__ == "__main__":
    main()
