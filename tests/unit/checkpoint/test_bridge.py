"""A run of Megatron-Bridge resumes from a merge of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import runs
from tests.runs import dump_common
from wsm_megatron import MergeConfig, merge, verify
from wsm_megatron.checkpoint.common_state import load_common, read_summary

STEP_DTYPES = {
    "step": torch.int64,
    "consumed_train_samples": torch.int64,
    "skipped_train_samples": torch.int64,
    "consumed_valid_samples": torch.int64,
    "floating_point_operations_so_far": torch.float32,
    "do_train": torch.bool,
    "do_valid": torch.bool,
    "do_test": torch.bool,
}
CONFIG: dict[str, Any] = {
    "_target_": "megatron.bridge.training.config.ConfigContainer",
    "checkpoint": {
        "_target_": "megatron.bridge.training.config.CheckpointConfig",
        "fully_parallel_save": True,
        "load": None,
        "save": "/checkpoints/ünï",
        "save_optim": True,
        "save_rng": True,
    },
    "model": {"seq_length": 16, "save_optim": True, "tensor_model_parallel_size": 1},
    "train": {"train_iters": 8},
}


def train_state(step: int) -> dict[str, torch.Tensor]:
    """``TrainState.state_dict()`` as ``save_checkpoint`` writes it."""
    values = [step, 4 * step, 1, 2, 1e15, True, True, False]
    pairs = zip(STEP_DTYPES.items(), values, strict=True)
    return {name: torch.tensor(value, dtype=dtype) for (name, dtype), value in pairs}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as Bridge leaves it: no ``args`` in the common state, its own files beside."""
    run = runs.copy_run(runs.FULLY, tmp_path / "run")
    for iteration in runs.ITERATIONS:
        checkpoint = runs.checkpoint(run, iteration)
        state = load_common((checkpoint / "common.pt").read_bytes(), "common.pt")
        del state["args"]
        (checkpoint / "common.pt").write_bytes(dump_common(state))
        torch.save(train_state(iteration), checkpoint / "train_state.pt")
        (checkpoint / "run_config.yaml").write_text(yaml.safe_dump(CONFIG, allow_unicode=True))
        (checkpoint / "tokenizer").mkdir()
        (checkpoint / "tokenizer" / "tokenizer.json").write_text("{}")
    torch.save(train_state(8), run / "latest_train_state.pt")
    return run


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """As ``read_train_state`` does."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert {name: value.dtype for name, value in state.items()} == STEP_DTYPES
    return {name: value.item() for name, value in state.items()}


@pytest.mark.parametrize("iteration", [None, 100])
@pytest.mark.parametrize("optimizer_state", ["drop", "last"])
def test_bridge_finds_the_merge_and_what_it_holds(
    run: Path, tmp_path: Path, optimizer_state: str, iteration: int | None
) -> None:
    config = MergeConfig(
        load=run,
        save=tmp_path / "out",
        optimizer_state=optimizer_state,
        output_iteration=iteration,
    )
    output, step = merge(config).output, iteration or 8
    expected = {name: value.item() for name, value in train_state(8).items()} | {"step": step}
    assert loaded(output / "train_state.pt") == expected
    latest = tmp_path / "out" / "latest_train_state.pt"
    assert latest.read_bytes() == (output / "train_state.pt").read_bytes()
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == str(step)
    if iteration is None:
        source = runs.checkpoint(run, 8) / "train_state.pt"
        assert latest.read_bytes() == source.read_bytes()
    kept = optimizer_state != "drop"
    settings = CONFIG["checkpoint"] | {"save_optim": kept, "save_rng": kept}
    stored = (output / "run_config.yaml").read_text()
    assert yaml.safe_load(stored) == CONFIG | {"checkpoint": settings}
    assert (output / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert verify(output, sources="all").files == len(list(output.rglob("*.*"))) - 1
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [output.name, "latest_checkpointed_iteration.txt", "latest_train_state.pt"]


def test_a_published_merge_has_bridges_tracker_put_right(run: Path, tmp_path: Path) -> None:
    """As where an earlier command died between publishing and moving the trackers."""
    config = MergeConfig(load=run, save=tmp_path / "out")
    merge(config)
    for name in ("latest_train_state.pt", "latest_checkpointed_iteration.txt"):
        (tmp_path / "out" / name).unlink()
    assert merge(config).bytes_written == 0
    assert loaded(tmp_path / "out" / "latest_train_state.pt")["step"] == 8


def test_other_files_of_these_names_are_no_concern(run: Path, tmp_path: Path) -> None:
    newest = runs.checkpoint(run, 8)
    for state in ({"step": 8}, [1], {"steps": torch.tensor(8)}):
        torch.save(state, newest / "train_state.pt")
        output = merge(MergeConfig(load=run, save=tmp_path / str(state))).output
        assert not (output / "train_state.pt").exists()
        assert not (output.parent / "latest_train_state.pt").exists()
    texts = ["a: [b", "- 1", "checkpoint: 3", "\x00", "checkpoint: {x: 1}"]
    texts += ["!!int ''", "!!bool x", "!!timestamp x"]  # which PyYAML's constructors fall over
    for number, text in enumerate(texts):
        (newest / "run_config.yaml").write_text(text)
        output = merge(MergeConfig(load=run, save=tmp_path / f"yaml{number}")).output
        assert (output / "run_config.yaml").read_text() == text


def test_settings_that_share_an_anchor(run: Path, tmp_path: Path) -> None:
    text = "checkpoint: # as saved\n  save_optim: &yes true\n  save_rng: *yes\nlr: 1e-05\n"
    (runs.checkpoint(run, 8) / "run_config.yaml").write_text(text)
    output = merge(MergeConfig(load=run, save=tmp_path / "out")).output
    stored = yaml.safe_load((output / "run_config.yaml").read_text())
    saved = {"save_optim": False, "save_rng": False}
    assert stored == {"checkpoint": saved, "lr": "1e-05"}, "YAML 1.1 has no such float"


def test_positions_are_tokens(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = merge(MergeConfig(load=run, save=tmp_path / "out", decay="1-sqrt"))
    assert report.merged[0].decay.unit == "tokens"
    assert report.merged[0].decay.positions == tuple(4 * i * 16 for i in runs.ITERATIONS)
    assert "positions are iterations" not in caplog.text


def test_a_train_state_that_is_another_file_says_nothing(run: Path) -> None:
    checkpoint = runs.checkpoint(run, 8)
    assert read_summary(checkpoint).tokens == 4 * 8 * 16
    torch.save({"step": torch.tensor(8)}, checkpoint / "train_state.pt")
    assert read_summary(checkpoint).tokens is None
    (checkpoint / "train_state.pt").unlink()
    assert read_summary(checkpoint).iteration == 8 and read_summary(checkpoint).tokens is None
