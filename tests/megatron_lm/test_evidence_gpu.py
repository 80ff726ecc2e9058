"""examples/wsm_vs_wsd/gpu.sh, from its first step to its last evaluation, with a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.megatron_lm.checkout import MODEL, REPOSITORY, environment, free_port

SIZES = {"SEEDS": "1", "ITERS": "12", "WARMUP": "2", "WINDOWS": "4", "INTERVAL": "2"}
SIZES |= {"MBS": "2", "GBS": "8", "SEQ": "16", "EVAL_ITERS": "1", "LR": "1e-3"}
MODELS = ["stable", *(f"decay-{style}-4" for style in ("linear", "cosine", "minus_sqrt"))]
MODELS += [f"merge-{decay}-4" for decay in ("mean", "ema", "cosine", "1-sqrt")]


def own_flags() -> list[str]:
    """The tiny model's, but for the schedule, which is the script's."""
    flags, skip = list(MODEL), ("--lr", "--min-lr", "--lr-decay-style", "--lr-warmup-iters")
    for flag in skip:
        at = flags.index(flag)
        del flags[at : at + 2]
    return flags


def run(megatron: Path, out: Path) -> None:
    tools = Path(sys.executable).parent
    settings = {"MEGATRON_LM": str(megatron), "DATA_PATH": "mock", "OUT": str(out), **SIZES}
    settings |= {"TOKENIZER_TYPE": "NullTokenizer", "PET_MASTER_PORT": str(free_port())}
    settings |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    script = REPOSITORY / "examples" / "wsm_vs_wsd" / "gpu.sh"
    done = subprocess.run(
        ["bash", str(script), *own_flags()],
        env=environment(megatron) | settings,
        cwd=megatron,
        capture_output=True,
        text=True,
        check=False,
    )
    logs = {path.name: path.read_text()[-2000:] for path in out.glob("seed1/logs/*")}
    assert done.returncode == 0, (done.stderr[-3000:], logs)


def test_every_model_is_trained_or_merged_and_evaluated(megatron: Path, tmp_path: Path) -> None:
    run(megatron, tmp_path)
    logs = {path.name: path.read_text() for path in tmp_path.glob("seed1/logs/*")}
    assert sorted(logs) == sorted(MODELS)
    losses = {}
    for name, log in logs.items():
        assert log.endswith("finished\n")
        (losses[name],) = re.findall(r"on validation set \| lm loss value: (\S+)", log)
    assert len(set(losses.values())) == len(losses), f"two models are the same: {losses}"
    rates = re.findall(r"learning rate: (\S+)", logs["decay-linear-4"])
    assert [float(rate) for rate in rates] == [7.5e-4, 5e-4, 2.5e-4, 0]

    before = sorted(tmp_path.rglob("*"))
    run(megatron, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before, "what is there is not done again"
