"""Several merges in a run of ``pretrain_gpt.py``: curves, checkpoints, and a launch that is dry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.dist.test_resume_mcore import same_weights
from tests.megatron_lm.checkout import MODEL, Outcome, launch, pretrain
from tests.megatron_lm.matrix.table import EP2, FULLY, LR_0, SHARDED, TRAIN
from tests.reference import load_tensors, same_bits
from wsm_megatron import MergeConfig, Sweep, SweepGrid, sweep

FLAGS = f"{SHARDED} {FULLY} {EP2} {TRAIN}"
DECAYS = ("1-sqrt", "mean")
WSM = "--wsm-merge --wsm-merge-decay 1-sqrt,mean --wsm-merge-num 2,3"
EMIT = "--wsm-merge-eval --wsm-merge-save-interval 4 --wsm-merge-emit 1-sqrt:2,mean:3"
NAMES = tuple(f"{decay}-last{number}" for number in (2, 3) for decay in DECAYS)

CURVES = '''
import json, sys, types
from wsm_megatron.launch import main

class SummaryWriter:
    """TensorBoard's, to a file of JSON lines."""
    def __init__(self, log_dir, **_):
        self.file = open(log_dir + ".jsonl", "a", buffering=1)
    def add_scalar(self, tag, value, step):
        print(json.dumps([tag, float(value), step]), file=self.file)
    def __getattr__(self, name):
        return lambda *_, **__: None

tensorboard = types.ModuleType("torch.utils.tensorboard")
tensorboard.SummaryWriter = SummaryWriter
sys.modules[tensorboard.__name__] = tensorboard
if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def trained(
    megatron: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome, Outcome]:
    """A run with four merges, and one without the plugin."""
    root = tmp_path_factory.mktemp("several")
    plain = pretrain(megatron, f"{FLAGS} --save {root / 'plain'}", plugin=False)
    (root / "curves.py").write_text(CURVES)
    flags = f"{FLAGS} --save {root / 'run'} --tensorboard-dir {root / 'board'} {WSM} {EMIT}"
    script = [str(root / "curves.py"), str(megatron / "pretrain_gpt.py")]
    merged = launch(megatron, [*script, *MODEL, *flags.split()])
    assert plain.returncode == 0, plain.log[-8000:]
    assert merged.returncode == 0, merged.log[-8000:]
    return root, merged, plain


def test_losses_are_those_of_a_run_without(trained: tuple[Path, Outcome, Outcome]) -> None:
    _, merged, plain = trained
    assert len(plain.losses) == 8 + 4 and merged.losses == plain.losses


def test_every_evaluation_is_one_of_each_merge(trained: tuple[Path, Outcome, Outcome]) -> None:
    """Two snapshots at iteration 4: both lengths are one merge."""
    found = re.findall(r"validation loss at (wsm [^|]+?) \|", trained[1].log)
    last = ["iteration 8", "iteration 8 on validation set", "iteration 8 on test set"]
    assert found == [
        *(f"wsm {decay}-last2 = {decay}-last3 iteration 4" for decay in DECAYS),
        *(f"wsm {name} {where}" for where in last for name in NAMES),
    ]


def test_each_has_its_curves(trained: tuple[Path, Outcome, Outcome]) -> None:
    root, merged, _ = trained
    points = [json.loads(line) for line in (root / "board.jsonl").read_text().splitlines()]
    for which in ("", *(f"wsm {name} " for name in NAMES)):
        for metric in ("lm loss", "max violation", "min violation"):
            steps = [step for tag, _, step in points if tag == f"{which}{metric} validation"]
            assert steps == [4, 8, 8, 8], (which, metric)
    assert merged.log.count("load of experts at") == 4 + 2 + 3 * 4
    least = [value for tag, value, _ in points if tag.endswith("min violation validation")]
    most = [value for tag, value, _ in points if tag.endswith("max violation validation")]
    assert all(-1 <= value < 0 for value in least) and all(0 < value < 3 for value in most)


def test_what_is_emitted_is_that_of_a_sweep_and_loads(
    megatron: Path, trained: tuple[Path, Outcome, Outcome], tmp_path: Path
) -> None:
    run = trained[0] / "run"
    assert sorted(p.name for p in (run / "wsm").iterdir()) == ["1-sqrt-last2", "mean-last3"]
    config = MergeConfig(load=run, save=tmp_path / "swept", optimizer_state="last")
    sweep(Sweep(config, SweepGrid(last=(2, 3), decay=DECAYS)))
    for name in ("1-sqrt-last2", "mean-last3"):
        emitted = load_tensors(run / "wsm" / name / "iter_0000008")
        offline = load_tensors(tmp_path / "swept" / name / "iter_0000008")
        assert emitted.keys() == offline.keys()
        assert all(same_bits(emitted[key], offline[key]) for key in offline)
    root, after = run / "wsm" / "mean-last3", tmp_path / "after"
    flags = f"{SHARDED} {FULLY} {EP2} {LR_0.format(next=9)} --load {root} --save {after}"
    resumed = pretrain(megatron, f"{flags} --save-interval 1", plugin=False)
    assert resumed.returncode == 0, resumed.log[-8000:]
    assert same_weights(root / "iter_0000008", after / "iter_0000009") == []


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_dry_run_says_what_fits_and_ends(megatron: Path, tmp_path: Path, store: str) -> None:
    flags = f"{FLAGS} --save {tmp_path / 'run'} --wsm-merge --wsm-merge-window-tokens 300,600"
    flags += f" --wsm-merge-store {store} --wsm-merge-eval --wsm-merge-dry-run"
    outcome = pretrain(megatron, flags)
    assert outcome.returncode == 0, outcome.log[-8000:]
    assert outcome.losses == [] and "ends here, before training" in outcome.log
    for tokens, number, covered in ((300, 2, 256), (600, 3, 512)):
        window = f"{number} snapshots over {2 * (number - 1)} iterations, {covered} tokens"
        assert f"--wsm-merge-window-tokens {tokens}: {window}" in outcome.log
    assert outcome.log.count("ends here") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--wsm-merge-num 2,9", "--wsm-merge-num 9 is never reached"),
        ("--wsm-merge-num 2,2", "--wsm-merge-num names a value twice"),
        ("--wsm-merge-num 2 --wsm-merge-decay mean,steep", "--wsm-merge-decay: unknown decay"),
        ("--wsm-merge-num 2 --wsm-merge-emit mean:2", "--wsm-merge-emit mean:2: the merges of"),
    ],
)
def test_wrong_combinations_are_refused_before_training(
    megatron: Path, tmp_path: Path, flags: str, message: str
) -> None:
    run = f"--save {tmp_path / 'run'} --wsm-merge --wsm-merge-eval"
    outcome = pretrain(megatron, f"{FLAGS} {run} {flags}")
    assert outcome.returncode != 0 and outcome.losses == []
    assert message in outcome.log
