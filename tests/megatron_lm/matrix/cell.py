"""One row with one version: trained plain and with the plugin, merged, resumed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.dist.test_resume_mcore import same_weights
from tests.megatron_lm.checkout import MODEL, Outcome
from tests.megatron_lm.matrix import kinds, promises
from tests.megatron_lm.matrix.table import OFFLINE, PLUGIN, RESUME, Configuration, Version
from wsm_megatron import MergeConfig, MergeError, UsageError, merge
from wsm_megatron.inspection.megatron_resume import check_resume
from wsm_megatron.planning.launch_flags import WEIGHTS_ONLY

PASSED, REFUSED, CANNOT_RUN, FAILED = "passed", "refused", "cannot run here", "failed"

WSM = (
    f"--wsm-merge --wsm-merge-num 3 --wsm-merge-decay {promises.DECAY} "
    "--wsm-merge-save-interval 4 --wsm-merge-eval"
)
MERGES, WINDOW, LAST = (4, 8), (4, 6, 8), "iter_0000008"
_EVALUATIONS = 4

Launch = Callable[..., Outcome]
"""``launch(flags, plugin=…, nproc=…)``."""


@dataclass(frozen=True)
class Result:
    """What became of a cell, and why where it did not pass."""

    status: str
    reason: str = ""


class Row:
    """One configuration with one version of Megatron-LM.

    Args:
        megatron: the checkout, as :func:`tests.megatron_lm.checkout.prepare` makes it.
        folder: empty, for its checkpoints.
        launch: runs the script with flags.
    """

    def __init__(
        self,
        version: Version,
        configuration: Configuration,
        megatron: Path,
        folder: Path,
        launch: Launch,
    ):
        self._configuration, self._folder, self._launch = configuration, folder, launch
        self._flags = launch_flags(version, configuration, megatron)
        self._plain_root, self._run = folder / "plain", folder / "run"
        self.merged: Path | None = None
        """Root of the offline merge, or of the plugin's where there is none."""
        self.logs: dict[str, str] = {}

    def results(self) -> dict[str, Result]:
        """By column."""
        plain = self._start("plain", f"{self._configuration.train} --save {self._plain_root}")
        found = {PLUGIN: self._plugin(plain)}
        found[OFFLINE] = self._offline(plain, found[PLUGIN])
        found[RESUME] = self._resume(found[OFFLINE])
        return found

    def _start(self, name: str, flags: str, plugin: bool = False) -> Outcome:
        nproc = self._configuration.nproc
        outcome = self._launch(f"{self._flags} {flags}", plugin=plugin, nproc=nproc)
        self.logs[name] = outcome.log
        return outcome

    def _plugin(self, plain: Outcome) -> Result:
        one = self._configuration
        state = "" if one.state == "last" else f"--wsm-merge-optimizer-state {one.state}"
        flags = f"{one.train} --save {self._run} {WSM} {one.wsm} {state}"
        merged = self._start(PLUGIN, flags, plugin=True)
        if refusal := refusal_in(merged.log):
            return Result(REFUSED, refusal) if not merged.losses else Result(FAILED, refusal)
        if reason := _why_no_run(plain):
            return Result(CANNOT_RUN, reason)
        if merged.returncode:
            return Result(FAILED, last_error(merged.log))
        return checked(lambda: self._check_plugin(merged, plain))

    def _check_plugin(self, merged: Outcome, plain: Outcome) -> None:
        one = self._configuration
        promises.assert_same_losses(merged, plain, WINDOW[-1], _EVALUATIONS)
        promises.assert_evaluated(merged, one)
        promises.assert_published(self._run, MERGES)
        for window in ((2, 4), WINDOW):
            if one.kind is not None:
                kinds.assert_is_merge(self._run, window, one.kind)
                continue
            promises.assert_is_merge(
                promises.Merged(
                    run=self._run,
                    path=self._run / "wsm" / f"iter_{window[-1]:07d}",
                    iterations=window,
                    positions=promises.positions(plain, window),
                    state=one.state,
                )
            )

    def _offline(self, plain: Outcome, plugin: Result) -> Result:
        passed = plugin.status == PASSED
        run, save = self._run if passed else self._plain_root, self._folder / "merged"
        if reason := _why_no_run(plain):
            return Result(CANNOT_RUN, reason)
        self.merged = run / "wsm" if passed else None
        state = self._configuration.state
        config = MergeConfig(
            load=run, save=save, last=3, decay=promises.DECAY, optimizer_state=state
        )
        try:
            merge(config)
        except (UsageError, MergeError) as error:
            return Result(REFUSED, _short(str(error)))
        if self.merged is None or self._configuration.kind is None:
            self.merged = save
        return checked(lambda: self._check_offline(run, save / LAST, plain, passed))

    def _check_offline(self, run: Path, path: Path, plain: Outcome, plugin: bool) -> None:
        state, kind = self._configuration.state, self._configuration.kind
        if kind is not None:
            kinds.assert_is_merge(run, WINDOW, kind.offline, path)
            return
        merged = promises.Merged(
            run=run,
            path=path,
            iterations=WINDOW,
            positions=promises.positions(plain, WINDOW),
            state=state,
            from_mains=state != "drop",
        )
        promises.assert_is_merge(merged)
        if plugin and state != "drop":
            promises.assert_same_merge(run / "wsm" / LAST, path)

    def _resume(self, offline: Result) -> Result:
        if self.merged is None:
            return offline
        found = checked(lambda: self._check_resume(self.merged))
        if found.status == FAILED and (error := self._why_not_its_own()):
            return Result(CANNOT_RUN, f"loads no checkpoint of its own run either: {error}")
        return found

    def _why_not_its_own(self) -> str:
        """What keeps Megatron from resuming the run itself; empty where nothing does."""
        root = self._run if (self._run / LAST).exists() else self._plain_root
        flags = resume_flags(self._configuration, WINDOW[-1])
        outcome = self._start("own", f"{flags} --load {root}")
        return last_error(outcome.log) if outcome.returncode else ""

    def _check_resume(self, root: Path | None) -> None:
        assert root is not None
        one, after = self._configuration, self._folder / "after"
        dropped = one.state == "drop"
        resumes = check_resume(root)
        assert resumes.resumes != dropped, f"resume-check: {'; '.join(resumes.problems)}"
        flags = f"{resume_flags(one, WINDOW[-1])} --load {root} --save {after} --save-interval 1"
        if dropped:
            flags += f" {' '.join(WEIGHTS_ONLY)} --lr 0"
        outcome = self._start(RESUME, flags)
        assert outcome.returncode == 0, last_error(outcome.log)
        assert_nothing_moved(root, after, one.kind)


def resume_flags(configuration: Configuration, newest: int) -> str:
    """For one step with LR 0 from a merge that ends at iteration ``newest``."""
    return configuration.resume.format(next=newest + 1)


def assert_nothing_moved(root: Path, after: Path, kind: kinds.Kind | None = None) -> None:
    """One step after the merge weights and main params are the merge's."""
    newest = int((root / "latest_checkpointed_iteration.txt").read_text())
    saved = after / f"iter_{newest + 1:07d}"
    assert saved.exists(), "the merge was not loaded"
    if kind is not None:
        kinds.assert_same_weights(root / f"iter_{newest:07d}", saved, kind)
        return
    moved = same_weights(root / f"iter_{newest:07d}", saved)
    assert moved == [], f"moved in a step with LR 0: {moved[:3]}"


def launch_flags(version: Version, configuration: Configuration, megatron: Path) -> str:
    """All flags of the model and the layout, as this version knows them."""
    left_out = {*version.unknown, *configuration.without}
    flags, kept = [], True
    for word in MODEL:
        kept = word not in left_out if word.startswith("--") else kept
        flags += [word] * kept
    flags += configuration.flags.split()
    for more in configuration.where_known:
        if _knows(megatron, more.split()[0]):
            flags += more.split()
    return " ".join(flags)


def _knows(megatron: Path, flag: str) -> bool:
    name = flag.removeprefix("--").replace("-", "_")
    training = megatron / "megatron" / "training"
    files = [training / "arguments.py", *training.rglob("*config.py")]
    files.append(megatron / "megatron" / "core" / "transformer" / "transformer_config.py")
    return any(name in f.read_text() or flag in f.read_text() for f in files)


_REFUSAL = re.compile(r"wsm_megatron\.errors\.\w+: (.+)")
_ERROR = re.compile(r"^(?:\[rank\d\]: *)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", re.MULTILINE)
_USAGE = re.compile(r"^\S+\.py: (error: .+)$", re.MULTILINE)


def refusal_in(log: str) -> str:
    """The plugin's message where it refused to start; empty where it did not."""
    found = _REFUSAL.search(log)
    return _short(found[1]) if found else ""


def last_error(log: str) -> str:
    """The message a launch ended with: of argument parsing, or of the first traceback."""
    found = _USAGE.search(log) or _ERROR.search(log)
    return _short(found[1]) if found else "ended without a message"


def _why_no_run(plain: Outcome) -> str:
    """Why the run without the plugin is none to compare with; empty where it is one."""
    if plain.returncode:
        return last_error(plain.log)
    steps = max(plain.samples, default=0)
    return "" if steps == WINDOW[-1] else f"the flags make {steps} iterations, not {WINDOW[-1]}"


def checked(check: Callable[[], None]) -> Result:
    try:
        check()
    except (AssertionError, UsageError, MergeError, KeyError, OSError) as error:
        return Result(FAILED, _short(f"{type(error).__name__}: {error}"))
    return Result(PASSED)


def _short(text: str, limit: int = 300) -> str:
    """One line, without colours and this machine's paths."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-])", "", " ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def keep(root: Path, target: Path) -> None:
    """Copy a merge away, for other versions to resume from."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root, target)
