"""A merge against raw reading plus writing of the same bytes, in one run.

    python benchmarks/end_to_end.py [--checkpoints 8] [--gib 1] [--ranks 1,2] [--repeat 3]

Prints one table: seconds, GB/s and the ratio to the floor (``cat`` of the sources' files into
/dev/null, then writing and syncing as many bytes as the merged checkpoint has), all with the page
cache warm, and the peak resident memory of a rank. Where ``MEGATRON_LM_DIR`` names a checkout with
``tools/checkpoint/weighted_merge.py``, that tool merges the same files in the same run, and the two
outputs are compared. Options that this script does not know go to ``wsm merge``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from generate import add_arguments, generate

_PIECE = 8 * 2**20


def timed(command: list[str]) -> tuple[float, int, str]:
    """Wall seconds, peak resident bytes of the largest process, output."""
    marker = ["/usr/bin/time", "-f", "peak %M"] if Path("/usr/bin/time").exists() else []
    start = time.perf_counter()
    done = subprocess.run([*marker, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    peaks = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("peak ")]
    return seconds, int(peaks[-1]) * 1024 if peaks else 0, done.stdout


def raw_read(files: list[Path]) -> float:
    with open(os.devnull, "wb") as sink:
        start = time.perf_counter()
        subprocess.run(["cat", *map(str, files)], stdout=sink, check=True)
        return time.perf_counter() - start


def raw_write(folder: Path, nbytes: int) -> float:
    data = os.urandom(_PIECE)
    path = folder / "raw"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for _ in range(0, nbytes, _PIECE):
            stream.write(data)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def merge_command(run: Path, out: Path, ranks: int, options: list[str]) -> list[str]:
    arguments = ["-m", "wsm_megatron", "merge", "--load", str(run), "--save", str(out), "--json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(launcher if ranks > 1 else []), *arguments, *options]


def reference_tool() -> Path | None:
    """Megatron-LM's own merge tool, where a checkout has it."""
    root = os.environ.get("MEGATRON_LM_DIR")
    tool = Path(root) / "tools/checkpoint/weighted_merge.py" if root else None
    return tool if tool and tool.is_file() else None


def reference_command(tool: Path, run: Path, out: Path, ranks: int) -> list[str]:
    last = int((run / "latest_checkpointed_iteration.txt").read_text())
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    options = ["--merge-inputs", str(run), "--start-checkpoint", "1000"]
    options += ["--end-checkpoint", str(last), "--merge-output", str(out)]
    return [sys.executable, *launcher, str(tool), *options]


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


def measure(run: Path, scratch: Path, ranks: list[int], repeat: int, options: list[str]) -> None:
    files = sorted(run.glob("iter_*/*.distcp"))
    size = sum(file.stat().st_size for file in files)
    raw_read(files)
    print(f"{len(files)} files, {size / 1e9:.2f} GB; {os.cpu_count()} cores; medians of {repeat}")
    print(f"{'':28} {'seconds':>8} {'GB/s':>7} {'x floor':>8} {'peak MiB':>9}")
    rows: dict[str, list[tuple[float, int]]] = {}
    tool, compared = reference_tool(), ""
    moved = 0.0
    floors = []
    for _ in range(repeat):
        for count in ranks:
            out = scratch / "out"
            seconds, peak, text = timed(merge_command(run, out, count, options))
            report = json.loads(text.strip().splitlines()[-1])
            moved = report["bytes_read"] + report["bytes_written"]
            rows.setdefault(f"wsm merge, {count} rank(s)", []).append((seconds, peak))
            rows.setdefault(f"  of it merging, {count} rank(s)", []).append((report["seconds"], 0))
            if tool is not None:
                other = scratch / "reference"
                seconds, peak, _ = timed(reference_command(tool, run, other, count))
                rows.setdefault(f"reference tool, {count} rank(s)", []).append((seconds, peak))
                name = Path(report["output"]).name
                compared = compare(out / name, other / name)
                shutil.rmtree(other)
            shutil.rmtree(out)
        read, write = raw_read(files), raw_write(scratch, report["bytes_written"])
        rows.setdefault("cat", []).append((read, 0))
        rows.setdefault("raw write and sync", []).append((write, 0))
        floors.append(read + write)
    floor = statistics.median(floors)
    for name, values in rows.items():
        seconds = statistics.median(value[0] for value in values)
        peak = max(value[1] for value in values)
        shown = f"{peak / 2**20:9.0f}" if peak else ""
        print(
            f"{name:28} {seconds:8.2f} {moved / seconds / 1e9:7.2f} {seconds / floor:8.2f} {shown}"
        )
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
