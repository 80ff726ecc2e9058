"""What a result needs to be believed: commit, hardware, versions and command of every run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from examples.wsm_vs_wsd.profile import PROFILES, Profile

_REPOSITORY = Path(__file__).resolve().parents[2]
_FILE = "runs.json"


def record_run(folder: Path, profile: Profile) -> None:
    """Add this run to those that worked on a folder. Refuses another profile, or other sizes."""
    runs = read_runs(folder)
    sizes = json.loads(json.dumps(asdict(profile)))
    if runs and runs[0]["profile"] != sizes:
        raise SystemExit(f"{folder} holds results of other sizes: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps([*runs, _this_run(sizes)], indent=1) + "\n")


def read_runs(folder: Path) -> list[dict[str, Any]]:
    path = folder / _FILE
    return json.loads(path.read_text()) if path.exists() else []


def collect(folder: Path) -> dict[str, Any]:
    """All that a folder holds, as one piece of data: ``runs``, and ``arms`` by name."""
    arms = [json.loads(path.read_text()) for path in sorted((folder / "arms").glob("*.json"))]
    return {"runs": read_runs(folder), "arms": {arm.pop("arm"): arm for arm in arms}}


def profile_of(data: dict[str, Any]) -> Profile:
    """The sizes that the results were made with, which a profile may have outgrown."""
    sizes = data["runs"][0]["profile"]
    lists = {k: tuple(v) for k, v in sizes.items() if isinstance(v, list)}
    return type(PROFILES["ci"])(**sizes | lists)


def _this_run(sizes: dict[str, Any]) -> dict[str, Any]:
    packages = ("torch", "megatron-core", "numpy")
    return {
        "command": shlex.join(["python", "-m", "examples.wsm_vs_wsd", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "machine": platform.machine()},
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        "profile": sizes,
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=_REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu() -> str:
    """Model name, and whether it multiplies bf16."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    return ", ".join([*names[:1], *flags])
