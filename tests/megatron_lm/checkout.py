"""A Megatron-LM checkout that runs here, and launches of its pretrain_gpt.py."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = Path(__file__).resolve().parent / "site"

MODEL = shlex.split("""
    --distributed-backend gloo --use-cpu-initialization --transformer-impl local
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64
    --seq-length 16 --max-position-embeddings 16 --position-embedding-type rope
    --normalization RMSNorm --disable-bias-linear --swiglu
    --micro-batch-size 2 --global-batch-size 8 --bf16 --attention-softmax-in-fp32
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --split 80,10,10 --num-workers 0
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm --disable-jit-fuser
    --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --lr-warmup-iters 2
    --log-interval 1 --ckpt-format torch_dist
""")


def prepare(checkout: Path, folder: Path) -> Path:
    """A tree of links to ``checkout`` with the compiled dataset helpers that it lacks."""
    inside = Path("megatron") / "core" / "datasets"
    for level in (Path(), *reversed(inside.parents[:-1])):
        (folder / level).mkdir(parents=True, exist_ok=True)
        for child in (checkout / level).iterdir():
            if child.suffix == ".py":
                shutil.copy(
                    child, folder / level
                )  # Python looks for modules beside the real script
            elif not inside.is_relative_to(level / child.name):
                (folder / level / child.name).symlink_to(child)
    shutil.copytree(checkout / inside, folder / inside)
    (folder / inside / "Makefile").write_text("default:\n")  # Megatron runs make at start
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    for compiled in (Path(spec.origin).parent / "datasets").glob("helpers_cpp*.so"):
        shutil.copy(compiled, folder / inside)
    return folder


@dataclass(frozen=True)
class Outcome:
    """A finished launch."""

    returncode: int
    log: str

    @property
    def losses(self) -> list[str]:
        """Iteration and loss of every training step and every evaluation, as printed."""
        training = r"iteration +(\d+)/.*?(lm loss: \S+)"
        evaluation = r"validation loss at (iteration [^|]+\|) (lm loss value: \S+)"
        found = re.findall(f"{training}|{evaluation}", self.log)
        return [" ".join(filter(None, parts)) for parts in found]

    @property
    def samples(self) -> dict[int, int]:
        """Consumed samples by iteration, as printed after each step."""
        found = re.findall(r"iteration +(\d+)/.*?consumed samples: +(\d+)", self.log)
        return {int(iteration): int(samples) for iteration, samples in found}

    @property
    def merged_losses(self) -> list[str]:
        """The evaluations of merged weights, as printed."""
        return re.findall(r"validation loss at (wsm iteration [^|]+?) \|", self.log)


def pretrain(
    megatron: Path,
    flags: str,
    *,
    plugin: bool = True,
    nproc: int = 2,
    timeout: float = 600,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run ``pretrain_gpt.py`` on gloo ranks to its end; with ``plugin`` through the launcher."""
    script = ["-m", "wsm_megatron.launch"] if plugin else []
    script += [str(megatron / "pretrain_gpt.py"), *MODEL, *flags.split()]
    return launch(megatron, script, nproc=nproc, timeout=timeout, env=env)


def launch(
    megatron: Path,
    script: list[str],
    *,
    nproc: int = 2,
    timeout: float = 600,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run a script with its arguments on gloo ranks to its end."""
    with tempfile.TemporaryFile("w+") as log:
        token = secrets.token_hex(8)
        process = _start(megatron, script, nproc, (env or {}) | {"LAUNCH_TOKEN": token}, log)
        try:
            process.wait(timeout)
        finally:
            _kill_all(token)
            process.wait()
        log.seek(0)
        return Outcome(process.returncode, log.read())


def _start(
    megatron: Path, script: list[str], nproc: int, env: dict[str, str], log: IO[str]
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    command += ["--master-port", str(free_port()), *script]
    return subprocess.Popen(
        command,
        env=environment(megatron) | env,
        cwd=megatron,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment(megatron: Path) -> dict[str, str]:
    """What every rank of a launch on the CPU has in its environment."""
    paths = [SITE, REPOSITORY, megatron, os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "MEGATRON_LM_ON_CPU": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONWARNINGS": "ignore",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }


def _kill_all(token: str) -> None:
    """Kill what is left of a launch: a killed rank leaves its checkpoint writers behind."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # not a process, not ours, or gone
            if token.encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def free_port() -> int:
    """A free port below those that the kernel gives out, so that nobody else is given it."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
