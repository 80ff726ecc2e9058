"""Score every merge of a sweep with lm-eval, into the file that ``wsm select`` reads.

    wsm sweep --load RUN --save OUT --last 4,8 --decay mean,ema --export hf --tokenizer TOKENIZER
    python examples/evaluate_merges.py OUT/sweep.json scores.csv --tasks hellaswag,arc_easy
    wsm select --manifest OUT/sweep.json --scores scores.csv --metric hellaswag.acc_norm

Options that it does not know go to lm-eval (``--num_fewshot 5 --batch_size auto``). The file is
written after every merge, and what is in it already is not scored again, so the same command goes
on where one ended. A column is ``TASK.METRIC``, with lm-eval's filter behind it where there is one.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Scores = dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    arguments, more = parser().parse_known_args(argv)
    file: Path = arguments.scores
    rows = read(file)
    for name, export in exports(arguments.manifest, arguments.also):
        if name in rows:
            continue
        print(f"scoring {name}", flush=True)
        command = [*shlex.split(arguments.lm_eval), "--model", arguments.model]
        model = ",".join([f"pretrained={export}", *arguments.model_args])
        command += ["--model_args", model, "--tasks", arguments.tasks, *more]
        rows[name] = evaluated(command)
        write(file, rows)
    print(f"{len(rows)} lines in {file}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, help="sweep.json of a sweep with --export hf")
    parser.add_argument("scores", type=Path, help="CSV file to write, or to go on with")
    parser.add_argument("--tasks", required=True, help="lm-eval's tasks, separated by commas")
    parser.add_argument("--model", default="hf", help="lm-eval's backend: hf, vllm (default: hf)")
    parser.add_argument(
        "--model-args",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the backend is told beside the folder: dtype=bfloat16 (repeatable)",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an export of a trained checkpoint to compare with, under its iteration (repeatable)",
    )
    parser.add_argument(
        "--lm-eval",
        default=f"{shlex.quote(sys.executable)} -m lm_eval run",
        metavar="CMD",
        help="how lm-eval is started (default: python -m lm_eval run)",
    )
    return parser


def exports(manifest: Path, also: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is scored: what it is called, and the folder of its export."""
    for one in also:
        name, _, folder = one.partition("=")
        yield name, folder
    for merge in json.loads(manifest.read_text())["merges"]:
        if merge["export"] is not None:
            yield merge["path"], merge["export"]
        elif merge["exists"]:
            sys.exit(f"{merge['path']} has no export: run the sweep again with --export hf")


def evaluated(command: Sequence[str]) -> Scores:
    """What one run of lm-eval says. Ends the script where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--output_path", folder])
        if done.returncode:
            sys.exit(
                f"{shlex.join(command)}: exit status {done.returncode}; what is scored is kept"
            )
        files = sorted(Path(folder).rglob("results*.json"))
        if not files:
            sys.exit(f"{shlex.join(command)}: it has written no results")
        return scores_of(json.loads(files[-1].read_text())["results"])


def scores_of(results: dict[str, dict[str, Any]]) -> Scores:
    """lm-eval's results, ``{"TASK": {"METRIC,FILTER": 0.5}}``, without standard errors."""
    scores = {}
    for task, found in results.items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or isinstance(value, (str, bool)):
                continue
            if value is not None and math.isfinite(value):
                scores[".".join([task, metric] + [kind] * (kind != "none"))] = float(value)
    return scores


def read(file: Path) -> dict[str, Scores]:
    """The lines that are there."""
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    return {
        line.pop("path"): {name: float(value) for name, value in line.items() if value}
        for line in lines
    }


def write(file: Path, rows: dict[str, Scores]) -> None:
    """All lines, at once: a script that is ended leaves a whole file."""
    columns = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    fresh = file.with_name(f".{file.name}.new")
    with fresh.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["path", *columns])
        writer.writeheader()
        writer.writerows({"path": name, **scores} for name, scores in rows.items())
    os.replace(fresh, file)


if __name__ == "__main__":
    main()
