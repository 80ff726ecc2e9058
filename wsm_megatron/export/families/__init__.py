"""The families of models that tables are there for, and which of them a checkpoint is of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wsm_megatron.errors import UsageError
from wsm_megatron.export.families.common import ANYTHING, SOME
from wsm_megatron.export.families.dense import LLAMA, QWEN2, QWEN3
from wsm_megatron.export.families.experts import BAILING_MOE_V2, GLM4_MOE, MIXTRAL, QWEN3_MOE
from wsm_megatron.export.families.gpt_oss import GPT_OSS
from wsm_megatron.export.families.latent import DEEPSEEK_V3
from wsm_megatron.export.families.nemotron_h import NEMOTRON_H
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.table import Family

_ALL = (
    *(LLAMA, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, GLM4_MOE, BAILING_MOE_V2, DEEPSEEK_V3, GPT_OSS),
    NEMOTRON_H,
)
FAMILIES = {one.name: one for one in _ALL}


def choose(args: ModelArgs, name: str | None) -> Family:
    """The family that a model can be written as.

    Args:
        name: that the user asks for.

    Raises:
        UsageError: none is, or several are, or the one that is asked for is not, with why.
    """
    if name is not None:
        family = FAMILIES[name]
        if reasons := list(_reasons(family, args)):
            raise UsageError(
                f"{args.where}: {name} cannot express this model: {'; '.join(reasons)}; where its "
                "args are wrong, --arg NAME=VALUE corrects them"
            )
        return family
    reasons_of = {family.name: list(_reasons(family, args)) for family in FAMILIES.values()}
    fit = [name for name, reasons in reasons_of.items() if not reasons]
    if len(fit) == 1:
        return FAMILIES[fit[0]]
    if fit:
        raise UsageError(
            f"{args.where}: its args fit {' and '.join(fit)}: give --family with one of them"
        )
    nearest = min(reasons_of, key=lambda name: len(reasons_of[name]))
    raise UsageError(
        f"{args.where}: no family here can express this model; nearest is {nearest}, but for "
        f"{'; '.join(reasons_of[nearest])}. --format safetensors keeps Megatron's names; where the "
        "args are wrong, --arg NAME=VALUE corrects them"
    )


def _reasons(family: Family, args: ModelArgs) -> Iterator[str]:
    """Why a family cannot express a model."""
    fits = True
    for name, allowed in family.takes.items():
        if (reason := _reason(args, name, allowed)) is not None:
            fits = False
            yield reason
    if fits:
        yield from family.refuses(args)


def _reason(args: ModelArgs, name: str, allowed: Any) -> str | None:
    if allowed == ANYTHING:
        return None
    if allowed == SOME:
        return f"{name} is not set" if args.get(name) is None else None
    values = allowed if isinstance(allowed, tuple) else (allowed,)
    takes_none = None in values or False in values
    value = args.get(name) if takes_none else args.need(name)
    if any(_same(value, one) for one in values):
        return None
    return f"{name} is {value}, not {' or '.join(map(str, values))}"


def _same(value: Any, allowed: Any) -> bool:
    if isinstance(value, bool) or isinstance(allowed, bool):
        return bool(value) == allowed if value is not None else allowed is False
    if isinstance(allowed, list):
        return isinstance(value, (list, tuple)) and set(value) == set(allowed)
    return value == allowed
