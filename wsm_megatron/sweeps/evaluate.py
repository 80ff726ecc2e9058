"""An evaluation command: it is told a checkpoint, and prints metrics.

The command is a line for the shell. ``{path}``, ``{root}`` and ``{iteration}`` in it stand for the
checkpoint, quoted, and ``{export}`` for its export; ``WSM_PATH``, ``WSM_ROOT``, ``WSM_ITERATION``
and ``WSM_EXPORT`` in its environment say the same. The last line that it prints on standard output
is a JSON object of metrics, ``{"loss": 1.25}``, or one number, which is the value of ``--metric``.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_megatron.errors import PassingError, UsageError
from wsm_megatron.options import NUMBER, TEXT, Options, option
from wsm_megatron.sweeps.metric import Metric, metrics_of

EVALUATION = "evaluation"
"""The heading that these options stand under."""
_SHOWN = 400
"""Characters of a command's standard error in a message."""


class EvaluationError(PassingError):
    """An evaluation failed. What was made before stays, and the same command goes on from it."""


@dataclass(frozen=True)
class EvaluationCommand:
    """What scores a checkpoint.

    Attributes:
        metric: that must be among what it prints.
        timeout: seconds after which it is ended; None: never.
    """

    line: str
    metric: str
    timeout: float | None = None

    def score(self, path: Path, export: Path | None = None) -> dict[str, float]:
        """Metrics of a checkpoint. On the rank that calls it; what the command starts ends with it.

        Args:
            export: its export, where it has one; the checkpoint itself may be missing then.

        Raises:
            EvaluationError: it fails, takes too long, or prints something else.
        """
        root, iteration = path.parent, path.name.removeprefix("iter_").lstrip("0") or "0"
        places = {"path": str(path), "root": str(root), "iteration": iteration}
        places |= {} if export is None else {"export": str(export)}
        line = self.line
        for name, value in places.items():
            line = line.replace("{" + name + "}", shlex.quote(value))
        environment = os.environ | {f"WSM_{name.upper()}": v for name, v in places.items()}
        return self._metrics(self._run(line, environment, path), path)

    def _run(self, line: str, environment: dict[str, str], path: Path) -> str:
        process = subprocess.Popen(
            line,
            shell=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that all it starts can be ended
        )
        try:
            out, err = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            raise EvaluationError(
                f"--eval {self.line}: {path}: not done after {self.timeout:g} s and ended; give it "
                "more with --eval-timeout. What is finished is kept: the same command goes on"
            ) from None
        except BaseException:
            _end(process)
            raise
        if process.returncode != 0:
            said = " ".join(err.split())[-_SHOWN:] or "nothing on standard error"
            raise EvaluationError(
                f"--eval {self.line}: {path}: exit status {process.returncode}: {said}. What is "
                "finished is kept: the same command goes on"
            )
        return out

    def _metrics(self, out: str, path: Path) -> dict[str, float]:
        lines = out.strip().splitlines()
        last = lines[-1].strip() if lines else ""
        found: Any = None
        with suppress(ValueError):
            found = json.loads(last)
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            found = {self.metric: found}
        if not isinstance(found, dict):
            raise EvaluationError(
                f"--eval {self.line}: {path}: its last line is {last[:_SHOWN]!r}, and neither a "
                'number nor a JSON object such as {"loss": 1.25}'
            )
        scores = {name: float(v) for name, v in found.items() if isinstance(v, (int, float))}
        value = scores.get(self.metric)
        if value is None:
            raise EvaluationError(
                f"--eval {self.line}: {path}: no {self.metric} in {last[:_SHOWN]}"
            )
        if wrong := [name for name, v in scores.items() if not math.isfinite(v)]:
            raise EvaluationError(f"--eval {self.line}: {path}: {', '.join(wrong)} is not finite")
        return scores


def _end(process: subprocess.Popen[str]) -> None:
    """End a command with everything that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """How merges are scored."""

    eval: str | None = option(
        "shell command that scores a checkpoint: {path}, {root} and {iteration} stand for it, "
        "{export} for its export; its "
        'last line is a JSON object such as {"loss": 1.25}, or a number',
        TEXT,
        None,
        group=EVALUATION,
        metavar="CMD",
    )
    metric: str = option(
        "what is compared: a name that --eval prints; NAME:min or NAME:max say which way is better",
        TEXT,
        "loss",
        group=EVALUATION,
        metavar="NAME",
    )
    eval_timeout: float | None = option(
        "seconds after which a command is ended, and the sweep with it",
        NUMBER,
        None,
        group=EVALUATION,
        metavar="SECONDS",
    )

    def check(self) -> None:
        if len(metrics_of(self.metric)) > 1:
            raise UsageError(f"--metric {self.metric}: one decides; wsm select compares two")
        if self.eval_timeout is not None and self.eval_timeout <= 0:
            raise UsageError(f"--eval-timeout {self.eval_timeout} must be above 0")

    @property
    def by(self) -> Metric:
        return metrics_of(self.metric)[0]

    @property
    def command(self) -> EvaluationCommand | None:
        if self.eval is None:
            return None
        return EvaluationCommand(self.eval, self.by.name, self.eval_timeout)
