"""What Megatron wrote of a merge is read back before it is published: one rank of several here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from wsm_megatron.checkpoint.layout import read_layout
from wsm_megatron.errors import MergeError
from wsm_megatron.plugin import readback

FULLY = "mcore0.16-dense-pp2-fully_reshardable"
FLAT = "mcore0.16-dense-dp2-dp_reshardable"


def test_right_main_params_pass() -> None:
    readback.check_written(runs.checkpoint(FULLY, 8), {})


def test_flat_buckets_and_no_optimizer_pass() -> None:
    readback.check_written(runs.checkpoint(FLAT, 8), {})
    readback.check_written(runs.checkpoint("mcore0.16-dense-dp2-noopt", 8), {})


def test_what_megatron_saved_wrongly_is_refused() -> None:
    with pytest.raises(MergeError, match=r"for \d tensors \(decoder\..*state drop"):
        readback.check_written(runs.checkpoint(runs.WRONG_MAINS, 4), {})


def test_one_element_in_one_layer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rank whose chunk it is, and by no other."""
    run = runs.copy_run(FULLY, tmp_path / "run")
    wrong = "optimizer.state.param.decoder.layers.mlp.linear_fc2.weight"

    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key == wrong:
            tensor.view(-1)[-1] += 1
        return tensor

    path = runs.checkpoint(run, 8)
    runs.rewrite(path, change)
    found: list[int] = []
    for rank in range(3):
        monkeypatch.setattr(readback, "rank_and_size", lambda rank=rank: (rank, 3))
        try:
            readback.check_written(path, {})
        except MergeError as error:
            assert "for 1 tensors (decoder.layers.mlp.linear_fc2.weight)" in str(error)
            found.append(rank)
    assert len(found) == 1


def test_the_ranks_share_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = read_layout(runs.checkpoint(FULLY, 8))
    seen: dict[str, list[Any]] = {}
    for rank in range(4):
        monkeypatch.setattr(readback, "rank_and_size", lambda rank=rank: (rank, 4))
        for key, entry in readback._share(layout).tensors.items():
            if not key.startswith("optimizer."):
                seen.setdefault(key, []).extend(entry.chunks)
    models = {k: e.chunks for k, e in layout.tensors.items() if not k.startswith("optimizer.")}
    assert {key: tuple(sorted(chunks)) for key, chunks in seen.items()} == models
