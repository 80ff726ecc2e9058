"""What lies beside the tensors: metadata goes with a merge, weights and training state do not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from pathlib import Path

import pytest

from tests import runs
from wsm_megatron import MergeConfig, MergeError, merge, verify
from wsm_megatron.access import shared
from wsm_megatron.access.node_local.inventory import take_inventory
from wsm_megatron.checkpoint.side_files import find_side_files
from wsm_megatron.cli.main import main
from wsm_megatron.planning.prepare import prepare_job

SHARDS = [f"__{rank}_{thread}.distcp" for rank in (0, 1) for thread in (0, 1)]
OWN = {".metadata", "metadata.json", "common.pt", "wsm_merge.json", "__0_0.distcp"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.copy_run(runs.DENSE, tmp_path / "run")


@pytest.fixture
def newest(run: Path) -> Path:
    return runs.checkpoint(run, 8)


def put(checkpoint: Path, *names: str) -> None:
    for name in names:
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def beside(output: Path) -> set[str]:
    names = {str(path.relative_to(output)) for path in output.rglob("*") if not path.is_dir()}
    return names - OWN


def merged(run: Path) -> Path:
    return merge(MergeConfig(load=run, save=run.parent / "out")).output


METADATA = (
    "config.json",
    "run_config.yaml",
    "note.txt",
    "LICENSE",
    "tokenizer/tokenizer.model",
    "tokenizer/deep/special_vocabulary.vocabx",
    "nemo_tokenizer/merges.txt",
    "context/io.json",
    "modelopt_state/common.pt",
    "modelopt_state/__0_0.distcp",
)
OTHER = (
    "optimizer.pt",
    "layer_wise_optimizer_0.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "trainer_state.json",
    "state.yaml",
    "rngstate.json",
    "rng_state_0.pth",
    "train_dataloader_dprank000.pt",
    "latest_checkpointed_iteration.txt",
    "hf/config.json",
    "hf/model-00001-of-00001.safetensors",
    "optimizer_shards/part.json",
    "mp_rank_00/model_optim_rng.pt",
    "deep/down/weights.npz",
    "tokenizer/model.safetensors",
    "without_suffix",
    "__9_0.distcp",
)


def test_metadata_is_copied_and_the_rest_is_named_in_one_warning(
    run: Path, newest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(newest, *METADATA, *OTHER)
    put(runs.checkpoint(run, 6), "older.txt")
    output = merged(run)
    assert beside(output) == set(METADATA)
    for name in METADATA:
        assert (output / name).read_text() == name
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    named = {name.split("/")[0] if name.split("/")[0] in ("hf",) else name for name in OTHER}
    named -= {"optimizer_shards/part.json", "mp_rank_00/model_optim_rng.pt"}
    for name in (*named, "optimizer_shards", "mp_rank_00"):
        assert f"{newest / name} (" in warning, name
    listed = json.loads((output / "wsm_merge.json").read_text())["files"]
    assert set(listed) == (OWN | set(METADATA)) - {"wsm_merge.json"}
    assert verify(output).files == len(listed)


def test_a_file_is_copied_whatever_its_size_says_of_tokenizers_only(
    run: Path, newest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsm_megatron.checkpoint.side_files.MOST_BYTES", 10)
    put(newest, "tokenizer/large_enough.json", "large_enough.json", "a.json")
    found = find_side_files(newest, SHARDS)
    assert {file.name for file in found.copied} == {"a.json", "tokenizer/large_enough.json"}
    assert any(name.startswith("large_enough.json (larger") for name in found.left_out)


def test_links_lead_nowhere_but_inside(
    run: Path, newest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    (tmp_path / "shared").mkdir()
    put(tmp_path / "shared", "vocab.json")
    put(newest, "a/real.json", "weights.pt")
    links = {
        "out.json": secret,
        "folder": tmp_path / "shared",
        "up": Path(".."),
        "self": Path("."),
        "a/loop": Path(".."),
        "around.json": Path("around.json"),
        "dangling.json": Path("nowhere"),
        "settings.json": Path("weights.pt"),
        "common.json": Path("common.pt"),
        "shard.json": Path("__0_0.distcp"),
        "device.json": Path("/dev/zero"),
        "older.json": Path("../iter_0000006/metadata.json"),
        "inside.json": Path("a/real.json"),
        "a/absolute.json": newest / "a" / "real.json",
    }
    for name, target in links.items():
        (newest / name).symlink_to(target)
    output = merged(run)
    inside = {"inside.json", "a/absolute.json"}
    assert beside(output) == {"a/real.json", *inside}
    for name in inside:
        assert not (output / name).is_symlink()
        assert (output / name).read_text() == "a/real.json"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    for name in links.keys() - inside:
        assert f"{newest / name} (" in warning, name
    verify(output)


def test_links_that_multiply_cost_nothing(run: Path, newest: Path) -> None:
    """Followed, they would be 2^20 folders."""
    for n in range(20):
        folder = newest / f"level{n}"
        folder.mkdir()
        for name in "ab":
            (folder / name).symlink_to(f"../level{n + 1}")
    (newest / "level0" / "note.txt").touch()
    assert beside(merged(run)) == {"level0/note.txt"}


def test_what_is_no_file_is_never_opened(run: Path, newest: Path) -> None:
    (newest / "tokenizer").mkdir()
    os.mkfifo(newest / "tokenizer" / "vocab.json")
    os.mkfifo(newest / "pipe.json")
    os.mkfifo(newest / "train_state.pt")
    before = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(newest)  # a socket's path is short
        server.bind("socket.json")
        os.chdir(before)
        found = find_side_files(newest, SHARDS)
    assert found.copied == ()
    assert {name.split(" (")[0] for name in found.left_out} == {
        "tokenizer/vocab.json",
        "pipe.json",
        "train_state.pt",
        "socket.json",
    }
    assert take_inventory(run)[8].keys() == take_inventory(run)[6].keys(), (
        "of ranks that see different files"
    )
    assert beside(merged(run)) == set()


def test_folders_have_a_bottom(newest: Path) -> None:
    put(newest, "/".join(["deep"] * 60 + ["note.txt"]))
    found = find_side_files(newest, SHARDS)
    assert found.copied == ()
    assert found.left_out[0].endswith("(more than 16 folders deep)")


def test_a_checkpoint_behind_a_link(run: Path, newest: Path, tmp_path: Path) -> None:
    put(newest, "tokenizer/vocab.json")
    (newest / "link.json").symlink_to("tokenizer/vocab.json")
    shutil.move(newest, tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert beside(merged(run)) == {"tokenizer/vocab.json", "link.json"}


def test_plan_lists_and_counts_them(
    run: Path, newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MergeConfig(load=run, save=run.parent / "out", decay="mean,ema")
    before = prepare_job(config).bytes_to_write()
    put(newest, "tokenizer/vocab.json", "optim.pt")
    assert prepare_job(config).bytes_to_write() == before + 2 * len("tokenizer/vocab.json")
    assert main(["plan", "--load", str(run), "--save", str(run.parent / "out"), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["copied", "beside", "tokenizer/vocab.json"] for line in lines)
    assert json.loads(lines[-1])["side_files"] == ["tokenizer/vocab.json"]


def test_a_file_that_changes_meanwhile_is_not_published(
    run: Path, newest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(newest, "tokenizer/vocab.json")
    run_rank = shared.run_rank

    def grow(*arguments: object) -> object:
        (newest / "tokenizer" / "vocab.json").write_text("longer than it was before")
        return run_rank(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shared, "run_rank", grow)
    with pytest.raises(MergeError, match=r"vocab\.json changed while"):
        merged(run)
    assert not list((run.parent / "out").glob("iter_*"))
