"""Main params that are not the rounded model: by design, by a defect, or as they are others'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.checkpoint.chunk_index import ChunkIndex
from wsm_megatron.checkpoint.common_state import attributes, load_common, read_common
from wsm_megatron.checkpoint.formats import CommonEntries
from wsm_megatron.checkpoint.keys import MERGEABLE, Role, is_flat_bucket, main_of, state_of
from wsm_megatron.checkpoint.layout import (
    COMMON_FILE,
    METADATA_FILE,
    Layout,
    TensorEntry,
    read_layout,
)
from wsm_megatron.checkpoint.reader import CheckpointReader
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.run_config import args_in, read_run_config
from wsm_megatron.errors import some
from wsm_megatron.optimizer.flat_buckets import in_threads
from wsm_megatron.optimizer.representation import REMAINDER, ROUNDED, Bounded, Representation

_QUANTISED = {
    "fp8_param_gather": "--fp8-param-gather",
    "fp4_param_gather": "--fp4-param-gather",
    "fp4_param": "--fp4-param-gather",  # its name in args through core 0.16
}
_KNOWN_FORMATS = {
    "fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "fp4_recipe": ("nvfp4",),
}
PRECISION_ARGS = (
    *_QUANTISED,
    *_KNOWN_FORMATS,
    "use_precision_aware_optimizer",
    "main_params_dtype",
)
"""What is looked at of Megatron's arguments."""
_BF16 = 2.0**-6
"""Roundings to bfloat16 before and after quantising, each of 2^-8 of a value, and some more."""
_BOUNDS = {
    # E4M3 has 3 bits after the point, E2M1 has 1: half a unit is 1/16 and 1/4 of a value. What is
    # below the smallest normal one differs by half a unit of that.
    "fp8": (2.0**-4 + _BF16, 2.0**-12),
    "fp4": (2.0**-2 + _BF16, 2.0**-4),
}
FP16_MAINS = Bounded("--main-params-dtype fp16", 2.0**-8 + 2.0**-10, 2.0**-20)
"""The model is rounded from a float32 value, and so is the float16 main param, scaled."""
_NO_WEIGHT = 2**8
"""Larger than any weight that is trained; nearly every remainder is."""
_LOOKED_AT = 4096
"""Elements of a main param by which it is told what it is."""

REMAINDERS = (
    "the low 16 bits of main params whose high ones are the bf16 weights "
    "(--use-precision-aware-optimizer)"
)


def quantised_by(args: Mapping[str, Any]) -> str | None:
    """The option by which a run keeps its model weights in FP8 or FP4; None where it does not.

    Megatron dequantises them for the checkpoint (``filesystem_async.py``); the main params stay
    float32. They were never rounded to what is saved.
    """
    return next((option for name, option in _QUANTISED.items() if args.get(name)), None)


def quantised_as(args: Mapping[str, Any]) -> Bounded | None:
    """How such a run's main params stand to its model; None where weights are not quantised.

    The bound is infinite for a format that is not known here (``custom`` recipes).
    """
    option = quantised_by(args)
    if option is None:
        return None
    name = "fp8" if "fp8" in option else "fp4"
    recipe = args.get(f"{name}_recipe")
    if recipe is not None and str(recipe) not in _KNOWN_FORMATS[f"{name}_recipe"]:
        return Bounded(option, math.inf, 0.0, finer=True)
    relative, absolute = _BOUNDS[name]
    return Bounded(option, relative, absolute, saturates=True, finer=True)


def are_remainders(main: torch.Tensor) -> bool:
    """Whether a float32 main param holds 16-bit remainders (``store_param_remainders``).

    With ``fully_reshardable`` they go through float32 buffers: integers within ±32768.
    """
    if REMAINDER.differ(main, main) or not main.numel():
        return False
    return main.abs().max().item() > _NO_WEIGHT


@dataclass(frozen=True)
class Kinds:
    """How the main params of one checkpoint are kept.

    Attributes:
        usual: all of them but for ``keyed``, and for integers, which are remainders.
        keyed: those that are not, by their keys.
    """

    usual: Representation = ROUNDED
    keyed: Mapping[str, Representation] = field(default_factory=dict)

    def of(self, main: TensorEntry) -> Representation:
        """How a main param is kept, or those of a flat bucket."""
        if main.dtype not in MERGEABLE:
            return REMAINDER
        return self.keyed.get(main.key, self.usual)

    @property
    def finer(self) -> bool:
        """Some say more of the weights than the model tensors do."""
        return self.usual.finer or any(kind.finer for kind in self.keyed.values())


def kinds_of(
    layout: Layout, args: Mapping[str, Any], sees: Callable[[str], bool] = lambda _: True
) -> Kinds:
    """How a checkpoint keeps its main params, by its args and, for remainders, by what is there.

    Where the precision-aware optimizer was used, or the args do not say, the beginning of every
    keyed main param of a bfloat16 tensor is read.

    Args:
        args: of the common state. sees: whether a file of it can be read here.

    Raises:
        MergeError: a tensor cannot be read.
    """
    aware = args.get("use_precision_aware_optimizer")
    usual: Representation = quantised_as(args) or ROUNDED
    if usual is ROUNDED and aware and args.get("main_params_dtype") is torch.float16:
        usual = FP16_MAINS
    if aware is False:
        return Kinds(usual)
    keys = [key for key, entry in layout.tensors.items() if _may_be_remainders(layout, entry)]
    seen = {key: region for key in keys if (region := _box_seen(layout, key, sees)) is not None}
    looked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    reader = CheckpointReader(layout)

    def look(key: str) -> None:
        model = main_of(key)
        assert model is not None
        looked[key] = reader.read(key, seen[key]), reader.read(model, seen[key])

    try:
        for key in seen if aware is None else ():
            look(key)
            if are_remainders(looked[key][0]):
                break
            if REMAINDER.differ(*looked[key]):
                return Kinds(usual)
        in_threads(seen, look)
    finally:
        reader.close()
    if not any(are_remainders(main) for main, _ in looked.values()):
        return Kinds(usual)
    others = {key for key, read in looked.items() if not _is_remainder(*read, usual)}
    return Kinds(usual, {key: REMAINDER for key in keys if key not in others})


def _may_be_remainders(layout: Layout, entry: TensorEntry) -> bool:
    state = state_of(entry.key)
    if entry.role is not Role.MAIN or state is None or state[2] != "param":
        return False
    model = layout.tensors.get(state[1])
    return (
        entry.dtype is torch.float32
        and model is not None
        and model.dtype is torch.bfloat16
        and model.shape == entry.shape
        and bool(entry.chunks)
    )


def _box_seen(layout: Layout, key: str, sees: Callable[[str], bool]) -> Region | None:
    """A few elements that can be read of a main param and of its model tensor; None: nowhere."""
    main, model = layout.tensors[key], layout.tensors[main_of(key) or ""]
    index = ChunkIndex(main)
    for chunk in model.chunks:
        region = next(Region(chunk.offsets, chunk.sizes).split(_LOOKED_AT))
        locations = [chunk.location, *(one.location for one in index.overlapping(region))]
        if all(sees(location.file) for location in locations):
            return region
    return None


def _is_remainder(main: torch.Tensor, model: torch.Tensor, usual: Representation) -> bool:
    """Where others are remainders, small integers are too, unless they may be quantised weights'
    main params."""
    if are_remainders(main):
        return True
    integers = not REMAINDER.differ(main, model)
    return integers and (usual is ROUNDED or bool(usual.differ(main, model)))


def saved_args(path: Path) -> dict[str, Any]:
    """The args in a checkpoint's common state; none where they are not on this machine.

    Raises:
        MergeError: the common state is damaged.
    """
    layout = None
    if not (path / COMMON_FILE).is_file():
        if not (path / METADATA_FILE).is_file():
            return {}
        layout = read_layout(path, whole=False)
        found = [one for one in layout.objects.values() if one.role is Role.COMMON]
        if not found or not all((path / one.location.file).is_file() for one in found):
            return {}
    return args_of(path, *read_common(path, layout))


def args_of(checkpoint: Path, common: bytes | CommonEntries, where: str) -> dict[str, Any]:
    """The args in a checkpoint's common state; where it has none, what Megatron-Bridge's run config
    says of precision; none where that is not on this machine either."""
    args = attributes(load_common(common, where).get("args"))
    return args or args_in(read_run_config(checkpoint), PRECISION_ARGS)


def explain(path: Path, main: str, values: torch.Tensor | None = None) -> str:
    """Why a checkpoint's main param may differ from its rounded model tensor, and the way out.

    Args:
        main: its key, or its flat bucket's. values: of it, where they were read.
    """
    if values is not None and are_remainders(values):
        return (
            f"What lies there are {REMAINDERS}, saved as float32, although the newest source has "
            "main params, or its args say that it has: leave this checkpoint out, or merge with "
            "--rebuild-main-params or --optimizer-state drop"
        )
    if option := quantised_by(saved_args(path)):
        return (
            f"It was saved with {option}: its model tensors are quantised weights, and its main "
            "params are more precise by design, but these are farther apart than that format is "
            "coarse. Is one of its files of another save? Restore it, leave this checkpoint out, "
            "or merge the quantised weights themselves with --optimizer-state drop --drop "
            "'*optimizer.*'"
        )
    if is_flat_bucket(main):
        return (
            "One step after a load Megatron would replace the model's weights by those. Is one of "
            "its files of another save? Restore it, leave this checkpoint out, or merge the "
            "weights alone with --optimizer-state drop"
        )
    return (
        "Megatron-LM through core_r0.19 can save such mains with fully_reshardable optimizer state "
        "and several DDP buckets; the model tensors are right then. Merge with "
        "--rebuild-main-params, or --optimizer-state drop"
    )


def no_main(path: Path, models: Sequence[str], bucket: str) -> str:
    """Message for model tensors that no main param in a checkpoint's flat buckets rounds to."""
    return (
        f"{path}: the main params of {some(models)} are not in its flat buckets (dp_reshardable): "
        f"nothing there rounds to them, and there are main params of other weights. "
        f"{explain(path, bucket)}"
    )
