"""What is exported, and how: the options of ``wsm export`` and of ``--export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from wsm_megatron.errors import UsageError
from wsm_megatron.export.families import FAMILIES
from wsm_megatron.options import PATH, SIZE, SWITCH, TEXT, Options, one_of, option, repeated

FORMATS = ("hf", "safetensors")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "same": None}
EXPORT = "export"
"""The heading that these options stand under."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """How a checkpoint's weights are written for others."""

    family: str | None = option(
        "the model's family in Hugging Face's names",
        one_of(tuple(FAMILIES)),
        None,
        default_text="what the checkpoint's args fit",
        group=EXPORT,
    )
    tokenizer: Path | None = option(
        "folder with a Hugging Face tokenizer, copied into the export; its size is the "
        "vocabulary's",
        PATH,
        None,
        group=EXPORT,
        metavar="DIR",
    )
    arg: tuple[str, ...] = option(
        "what the checkpoint's args do not say, or say wrong: rotary_base=1000000 (repeatable)",
        repeated(TEXT),
        (),
        group=EXPORT,
        metavar="NAME=VALUE",
    )
    export_dtype: str = option(
        "dtype of the exported weights; biases of routers stay float32",
        one_of(tuple(DTYPES)),
        "bf16",
        group=EXPORT,
    )
    leave_out: tuple[str, ...] = option(
        "leave model tensors out of the export whose key matches (repeatable)",
        repeated(TEXT),
        (),
        group=EXPORT,
        metavar="PATTERN",
    )
    shard_size: int = option(
        "most bytes of tensors in a file, unless one has more",
        SIZE,
        5_000_000_000,
        default_text="5GB",
        group=EXPORT,
        least=1,
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions):
    """What is exported."""

    load: Path = option(
        "checkpoint: an iter_XXXXXXX folder", PATH, group=EXPORT, metavar="CHECKPOINT"
    )
    save: Path = option("folder that the export becomes", PATH, group=EXPORT, metavar="DIR")
    format: str = option(
        "hf: a Hugging Face model; safetensors: the same files under Megatron's own names",
        one_of(FORMATS),
        "hf",
        group=EXPORT,
    )


@dataclass(frozen=True, kw_only=True)
class MergeExport(ExportOptions):
    """What is exported of each merge, in the pass that makes it."""

    export: str | None = option(
        "also write each merge's weights for others: hf, a Hugging Face model; safetensors, "
        "the same files under Megatron's own names",
        one_of(FORMATS),
        None,
        group=EXPORT,
    )
    export_save: Path | None = option(
        "root of the exports, each in a folder named as its merge is",
        PATH,
        None,
        default_text="a folder hf or safetensors beside the merges",
        group=EXPORT,
        metavar="DIR",
    )
    export_only: bool = option(
        "publish the exports alone, no Megatron checkpoints: nothing but the weights is read",
        SWITCH,
        False,
        group=EXPORT,
    )

    def check(self) -> None:
        changed = [one.flag for one in self.options() if getattr(self, one.name) != one.default]
        if self.export is None and changed:
            raise UsageError(f"{changed[0]} has no effect without --export")

    def root(self, merges: Path) -> Path:
        """Where exports go of merges below a root."""
        assert self.export is not None
        return merges / self.export if self.export_save is None else self.export_save

    def of(self, checkpoint: Path, root: Path) -> ExportConfig:
        """The export of a merge below ``root``."""
        assert self.export is not None
        values = {one.name: getattr(self, one.name) for one in ExportOptions.options()}
        return ExportConfig(
            load=checkpoint,
            save=self.root(root) / checkpoint.relative_to(root),
            format=self.export,
            **values,
        )
