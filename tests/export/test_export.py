"""What an export promises, whatever the model: whole or not at all, sound, the same for any job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from tests import runs
from tests.reference import RUNS, load_tensors, rounded, same_bits
from wsm_megatron import MergeConfig, MergeError, UsageError, merge
from wsm_megatron.api import merge_and_export
from wsm_megatron.cli.main import main
from wsm_megatron.config import ExecutionOptions
from wsm_megatron.errors import EXIT_FAILED, EXIT_USAGE
from wsm_megatron.export import job as export_job
from wsm_megatron.export.job import export
from wsm_megatron.export.options import ExportConfig, MergeExport
from wsm_megatron.export.target import RECORD_FILE, read_record

CHECKPOINT = RUNS / runs.MAIN / "iter_0000008"
"""A Llama of two layers, with the args of Megatron-LM; bfloat16, 128 tokens."""


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, by the safetensors library."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for name, file in weight_map.items():
        with safe_open(folder / file, "pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def run(folder: Path, **more: Any) -> Path:
    return export(ExportConfig(load=CHECKPOINT, save=folder, **more)).path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_megatrons_own_names(tmp_path: Path) -> None:
    tensors = load(run(tmp_path / "own", format="safetensors", export_dtype="same"))
    stored = {k: v for k, v in load_tensors(CHECKPOINT).items() if "optimizer" not in k}
    assert tensors.keys() == stored.keys()
    assert all(same_bits(tensors[key], stored[key]) for key in stored)
    assert "config.json" not in contents(tmp_path / "own")


def test_wider_weights_are_rounded_once(tmp_path: Path) -> None:
    """A float64 beside a tie of float32: rounded twice it would go to the other neighbour."""
    source = runs.copy_run(runs.MAIN, tmp_path / "run") / "iter_0000008"
    near_tie = 1 + 2.0**-8 + 2.0**-40

    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() * near_tie if key == "output_layer.weight" else tensor

    runs.rewrite(source, change)
    head = load_tensors(source)["output_layer.weight"].numpy()
    folder = export(ExportConfig(load=source, save=tmp_path / "hf")).path
    assert same_bits(
        load(folder)["lm_head.weight"], rounded(np.ascontiguousarray(head), torch.bfloat16)
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    tensors = load(run(tmp_path / "hf", export_dtype=dtype))
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert {tensor.dtype for tensor in tensors.values()} == {names[dtype]}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == str(names[dtype]).removeprefix("torch.")


def test_files_of_a_bounded_size_with_an_index(tmp_path: Path) -> None:
    one = load(run(tmp_path / "one"))
    folder = run(tmp_path / "many", shard_size=9000)
    many = load(folder)
    assert one.keys() == many.keys()
    assert all(same_bits(one[name], many[name]) for name in one)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    for n, file in enumerate(files, 1):
        assert file.name == f"model-{n:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file, "pt") as opened:
            nbytes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(nbytes) <= 9000 or len(nbytes) == 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())


@pytest.mark.parametrize("ranks", ["1", "3"])
def test_no_byte_depends_on_ranks_or_threads(ranks: str, tmp_path: Path) -> None:
    expected = contents(run(tmp_path / "here", shard_size=9000))
    flags = ["--save", str(tmp_path / "there"), "--shard-size", "9000", "--threads", "2"]
    assert main(["export", str(CHECKPOINT), *flags, "--local-ranks", ranks]) == 0
    assert contents(tmp_path / "there") == expected


def test_a_tensor_is_read_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(run(tmp_path / "whole"))
    monkeypatch.setattr("wsm_megatron.export.rank.TILE_ELEMENTS", 7)
    assert contents(run(tmp_path / "tiles")) == expected


def test_what_it_is_of_is_recorded(tmp_path: Path) -> None:
    folder = run(tmp_path / "hf", arg=("rotary_base=500",))
    record = read_record(folder)
    assert record is not None
    assert record["source"] == str(CHECKPOINT.resolve()) and record["iteration"] == 8
    assert record["family"] == "llama" and record["options"]["arg"] == ["rotary_base=500"]
    assert record["merge"] is None
    assert record["files"].keys() == contents(folder).keys() - {RECORD_FILE}
    data = (folder / RECORD_FILE).read_text()
    (folder / RECORD_FILE).write_text(data.replace("llama", "lamma"))
    with pytest.raises(MergeError, match="damaged"):
        read_record(folder)


def test_the_same_export_again_is_left_as_it_is(tmp_path: Path) -> None:
    run(tmp_path / "hf")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()}
    assert export(ExportConfig(load=CHECKPOINT, save=tmp_path / "hf")).already
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()} == before
    with pytest.raises(UsageError, match="exists and is left alone"):
        run(tmp_path / "hf", export_dtype="fp32")
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="exists and is left alone"):
        run(tmp_path / "other")


def test_a_damaged_checkpoint_becomes_no_export(tmp_path: Path) -> None:
    source = runs.copy_run(runs.MAIN, tmp_path / "run") / "iter_0000008"
    entry = export_job.make_plan(ExportConfig(load=source, save=tmp_path / "hf")).layout
    chunk = entry.tensors["embedding.word_embeddings.weight"].chunks[0]
    middle = chunk.location.offset + chunk.location.length // 2
    runs.flip_byte(source / chunk.location.file, middle)
    with pytest.raises(MergeError, match="CRC-32 of embedding.word_embeddings.weight"):
        export(ExportConfig(load=source, save=tmp_path / "out" / "hf"))
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_that_are_cut_are_checked_too(tmp_path: Path) -> None:
    """A record of which a part is not exported is still compared with its CRC-32."""
    source = runs.copy_run(runs.MAIN, tmp_path / "run") / "iter_0000008"
    layout = export_job.make_plan(ExportConfig(load=source, save=tmp_path / "hf")).layout
    chunk = layout.tensors["embedding.word_embeddings.weight"].chunks[0]
    runs.flip_byte(source / chunk.location.file, chunk.location.offset + chunk.location.length // 2)
    config = ExportConfig(load=source, save=tmp_path / "out" / "hf", arg=("vocab_size=10",))
    with pytest.raises(MergeError, match="CRC-32"):
        export(config)


def test_nothing_half_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def fail(*args: Any) -> None:
        seen.append(visible(tmp_path))
        raise MergeError("on purpose")

    monkeypatch.setattr(export_job, "write_beside", fail)
    with pytest.raises(MergeError, match="on purpose"):
        run(tmp_path / "hf")
    assert seen == [[]] and list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".hf.wsm-export"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    run(tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_that_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = runs.copy_run(runs.MAIN, tmp_path / "run") / "iter_0000008"
    check: Callable[..., None] = export_job.check_read

    def change(*args: Any) -> None:
        check(*args)
        (source / "common.pt").unlink(missing_ok=True)
        (source / "new").write_text("")

    monkeypatch.setattr(export_job, "check_read", change)
    with pytest.raises(MergeError, match="changed while it was read"):
        export(ExportConfig(load=source, save=tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def tokenizer(folder: Path, tokens: int = 100) -> Path:
    folder.mkdir()
    vocabulary = {f"t{n}": n for n in range(tokens - 2)}
    added = [{"id": tokens - 2, "content": "<s>"}, {"id": tokens - 1, "content": "</s>"}]
    contents = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(b"weights of another model")
    return folder


def test_a_tokenizer_gives_size_and_special_tokens(tmp_path: Path) -> None:
    folder = run(tmp_path / "hf", tokenizer=tokenizer(tmp_path / "tokenizer"))
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 100
    assert (config["bos_token_id"], config["eos_token_id"]) == (98, 99)
    assert config["pad_token_id"] is None
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 99
    assert load(folder)["model.embed_tokens.weight"].shape[0] == 100
    assert (folder / "tokenizer.json").exists() and not (folder / "pytorch_model.bin").exists()
    with pytest.raises(UsageError, match="128 rows, less than the vocabulary's 200"):
        run(tmp_path / "more", tokenizer=tokenizer(tmp_path / "larger", 200))
    with pytest.raises(UsageError, match="neither tokenizer.json"):
        run(tmp_path / "none", tokenizer=tmp_path)


def test_merges_are_exported_by_the_same_job(tmp_path: Path) -> None:
    config = MergeConfig(
        load=RUNS / runs.MAIN, save=tmp_path / "merged", last=3, decay="linear,ema"
    )
    done, exports = merge_and_export(config, MergeExport(export="hf"))
    assert [one.path for one in exports] == [
        tmp_path / "merged" / "hf" / decay / "iter_0000008" for decay in ("linear", "ema")
    ]
    for merged, exported in zip(done.merged, exports, strict=True):
        alone = export(
            ExportConfig(load=merged.output, save=tmp_path / "alone" / exported.path.parent.name)
        )
        assert contents(alone.path) == contents(exported.path)
        record = read_record(exported.path)
        assert record is not None and record["merge"]["coefficients"] == list(merged.coefficients)
    again, exports = merge_and_export(config, MergeExport(export="hf"))
    assert again.bytes_read == 0 and all(one.already for one in exports)


def test_an_export_is_made_up_for_when_the_merge_is_there(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / runs.MAIN, save=tmp_path / "merged", last=3)
    merge(config)
    _, (one,) = merge_and_export(config, MergeExport(export="safetensors"))
    assert one.path == tmp_path / "merged" / "safetensors" / "iter_0000008"
    assert load(one.path).keys() == {
        key for key in load_tensors(tmp_path / "merged" / "iter_0000008") if "optimizer" not in key
    }


def test_what_cannot_be_exported_is_not_merged_first(tmp_path: Path) -> None:
    config = MergeConfig(load=RUNS / runs.MAIN, save=tmp_path / "merged", last=3)
    with pytest.raises(UsageError, match="qwen3 cannot express this model: qk_layernorm is False"):
        merge_and_export(config, MergeExport(export="hf", family="qwen3"), ExecutionOptions())
    assert not (tmp_path / "merged").exists()


def test_plan_says_what_would_be_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load", str(RUNS / runs.MAIN), "--save", str(tmp_path / "merged"), "--last", "2"]
    assert main(["plan", *flags, "--export", "hf"]) == 0
    target = tmp_path / "merged" / "hf" / "iter_0000008"
    assert f"would export {target} (llama, " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--format", "hf", "--save", str(tmp_path / "hf"), "--json"]
    assert main(["export", str(CHECKPOINT), *flags]) == 0
    shown, data = capsys.readouterr().out.splitlines()
    assert "(llama, 21 tensors" in shown
    assert json.loads(data)["path"] == str(tmp_path / "hf")
    merged = ["--load", str(RUNS / runs.MAIN), "--save", str(tmp_path / "merged"), "--last", "2"]
    assert main(["merge", *merged, "--export", "hf", "--export-save", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "iter_0000008") in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["export", str(CHECKPOINT)], "give --save"),
        (["export", "/nowhere", "--save", "/nowhere/hf"], "no such checkpoint"),
        (["export", str(CHECKPOINT), "--save", "x", "--arg", "rotary_base"], "not NAME=VALUE"),
        (["export", str(CHECKPOINT), "--save", "x", "--leave-out", "no*"], "matches no model"),
        (["merge", "--load", "a", "--save", "b", "--family", "llama"], "without --export"),
    ],
)
def test_mistakes(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == EXIT_USAGE
    assert words in capsys.readouterr().err


def test_bridges_run_config_takes_the_place_of_args(tmp_path: Path) -> None:
    """The fields of Megatron-Bridge's model provider, as its ``run_config.yaml`` has them."""
    source = runs.copy_run(runs.DENSE, tmp_path / "run") / "iter_0000008"
    expected = contents(export(ExportConfig(load=source, save=tmp_path / "args")).path)
    args: dict[str, Any] = {}

    def leave_out_args(state: dict[str, Any]) -> None:
        args.update(vars(state.pop("args")))

    runs.restate(source, leave_out_args)
    with pytest.raises(UsageError, match=r"do not say normalization.*--arg normalization=VALUE"):
        export(ExportConfig(load=source, save=tmp_path / "hf"))
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
    names += ("normalization", "position_embedding_type", "rotary_base", "rotary_percent")
    model = {name: args[name] for name in names} | {
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "gated_linear_unit": True,
        "layernorm_epsilon": args["layernorm_epsilon"],
        "num_moe_experts": None,
        "num_query_groups": args["num_attention_heads"],
        "rope_scaling": False,
        "seq_length": args["max_position_embeddings"],
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        "vocab_size": 128,
    }
    (source / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    found = contents(export(ExportConfig(load=source, save=tmp_path / "hf")).path)
    assert {name: found[name] for name in ("config.json", "model.safetensors")} == {
        name: expected[name] for name in ("config.json", "model.safetensors")
    }
    (source / "run_config.yaml").write_text("model: [")
    with pytest.raises(UsageError, match=r"do not say normalization"):  # no YAML: not Bridge's
        export(ExportConfig(load=source, save=tmp_path / "more"))


def test_a_failure_of_one_rank_ends_all(tmp_path: Path) -> None:
    source = runs.copy_run(runs.MAIN, tmp_path / "run") / "iter_0000008"
    layout = export_job.make_plan(ExportConfig(load=source, save=tmp_path / "hf")).layout
    chunk = layout.tensors["output_layer.weight"].chunks[0]
    runs.flip_byte(source / chunk.location.file, chunk.location.offset + chunk.location.length // 2)
    flags = ["--save", str(tmp_path / "out" / "hf"), "--shard-size", "9000", "--local-ranks", "3"]
    assert main(["export", str(source), *flags]) == EXIT_FAILED
    assert list((tmp_path / "out").iterdir()) == []
