"""From a family's table to tensors: each that it names is found, each element has one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch

from wsm_megatron.checkpoint.layout import TensorEntry
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.tiling import tiling_fault
from wsm_megatron.errors import UsageError, some
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.names import Part, parts_of
from wsm_megatron.export.transforms import Output, Shape, Transform, plain

Kinds = Sequence[frozenset[str]]
"""By layer, those of MTP last, what is in it: the rows of a table are for layers of a kind."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        hf: names of the tensors that the rule gives, with ``{layer}`` and ``{expert}``.
        megatron: name of the tensor (:mod:`.names`), or the names that it may have.
        how: the rule.
        kind: of the layers that it is for; empty for all.
        when: whether the model has it at all.
        dtype: whatever ``--dtype`` says.
        joins: what several Megatron tensors become: ``stack`` for all experts of a layer, along a
            new first axis; ``concatenate`` for the names in ``megatron``, along the first.
    """

    hf: tuple[str, ...]
    megatron: tuple[str, ...]
    how: Transform = plain
    kind: str = ""
    when: Callable[[ModelArgs], bool] = lambda args: True
    dtype: torch.dtype | None = None
    joins: str = ""


def row(hf: str | tuple[str, ...], megatron: str | tuple[str, ...], **more: Any) -> Row:
    """A :class:`Row`; a single name need not be a tuple."""
    return Row(
        (hf,) if isinstance(hf, str) else hf,
        (megatron,) if isinstance(megatron, str) else megatron,
        **more,
    )


@dataclass(frozen=True)
class Family:
    """A model of Hugging Face's, and the Megatron models that it is the same as.

    Attributes:
        name: its ``model_type``, and what ``--family`` takes.
        table: where its tensors come from.
        takes: values of args that it can express, each one or several; any other is refused.
        config: what ``config.json`` says of the model, beside its family and its dtype.
        kinds: what is in each layer.
        refuses: what else of the args it cannot express, in words.
        copies: names that MTP's layers give tensors of the model again.
    """

    name: str
    architecture: str
    table: tuple[Row, ...]
    takes: Mapping[str, Any]
    config: Callable[[ModelArgs], dict[str, Any]]
    kinds: Callable[[ModelArgs], Kinds]
    refuses: Callable[[ModelArgs], Iterable[str]] = lambda args: ()
    copies: Mapping[str, str] = field(default_factory=dict)


class Piece(NamedTuple):
    """A region of a stored tensor whose elements follow each other in an exported one.

    ``view`` and ``order`` as of :class:`.transforms.Block`.
    """

    key: str
    region: Region
    view: Shape = ()
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """An exported tensor: the elements of its pieces, end to end."""

    name: str
    dtype: torch.dtype
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def tensors_of(
    family: Family, args: ModelArgs, entries: Mapping[str, TensorEntry], dtype: torch.dtype | None
) -> list[Tensor]:
    """The tensors of an export, in the order of the table.

    Args:
        entries: the checkpoint's model tensors, all that are to be exported.
        dtype: of what has none in the table; None keeps each as it is stored.

    Raises:
        UsageError: the table asks for what is not there, or does not cover what is.
    """
    found = _Found(args, parts_of(entries.values(), args.layers), entries, dtype)
    tensors: dict[str, Tensor] = {}
    for line, names in _lines(family, args):
        for one in found.tensors(line, names):
            assert one.name not in tensors, f"{one.name} twice"
            tensors[one.name] = one
    _check_covered(family, args, entries, tensors.values())
    for name, again in _copies(family, args):
        tensors[again] = replace(tensors[name], name=again)
    return list(tensors.values())


def _lines(family: Family, args: ModelArgs) -> Iterator[tuple[Row, dict[str, int]]]:
    """Every row, once for each layer and expert that it is for."""
    kinds, experts = family.kinds(args), args.get("num_experts") or 0
    for line in family.table:
        if not line.when(args):
            continue
        if "{layer}" not in line.hf[0]:
            yield line, {}
            continue
        for layer, kind in enumerate(kinds):
            if line.kind and line.kind not in kind:
                continue
            each = range(experts) if "{expert}" in line.hf[0] else [None]
            for expert in each:
                yield line, {"layer": layer} | ({} if expert is None else {"expert": expert})


def _copies(family: Family, args: ModelArgs) -> Iterator[tuple[str, str]]:
    for layer in range(args.layers, args.layers + args.mtp_layers):
        for name, again in family.copies.items():
            yield name, again.format(layer=layer)


@dataclass(frozen=True)
class _Found:
    """The parts of a checkpoint, to be looked up by rows."""

    args: ModelArgs
    parts: Mapping[str, Part]
    entries: Mapping[str, TensorEntry]
    dtype: torch.dtype | None

    def tensors(self, line: Row, names: dict[str, int]) -> list[Tensor]:
        sources = self._sources(line, names)
        outputs = [self._moved(line, part) for part in sources]
        made = []
        for n, name in enumerate(line.hf):
            ours = [one[n] for one in outputs]
            pieces = tuple(
                Piece(part.key, part.place(block.region), block.view, block.order)
                for part, output in zip(sources, ours, strict=True)
                for block in output.blocks
            )
            dtype = line.dtype or self.dtype or self.entries[sources[0].key].dtype
            shape = _joined(line.joins, [output.shape for output in ours])
            made.append(Tensor(name.format(**names), dtype, shape, pieces))
        return made

    def _moved(self, line: Row, part: Part) -> tuple[Output, ...]:
        try:
            return line.how(part.shape, self.args)
        except UsageError as error:
            raise UsageError(f"{self.args.where}: {part.key}: {error}") from error

    def _sources(self, line: Row, names: dict[str, int]) -> list[Part]:
        if line.joins == "concatenate":
            return [self._one((name,), line, names) for name in line.megatron]
        if line.joins == "stack":
            experts = range(self.args.need("num_experts"))
            return [self._one(line.megatron, line, {**names, "expert": e}) for e in experts]
        return [self._one(line.megatron, line, names)]

    def _one(self, known_as: Sequence[str], line: Row, names: dict[str, int]) -> Part:
        wanted = [name.format(**names) for name in known_as]
        for name in wanted:
            if name in self.parts:
                return self.parts[name]
        raise UsageError(
            f"{self.args.where}: {line.hf[0].format(**names)} is made of {' or '.join(wanted)}, "
            "which the checkpoint does not have; is it of another family (--family)?"
        )


def _joined(joins: str, shapes: Sequence[Shape]) -> Shape:
    if joins == "stack":
        return len(shapes), *shapes[0]
    if joins == "concatenate":
        return sum(shape[0] for shape in shapes), *shapes[0][1:]
    (shape,) = shapes
    return shape


def _check_covered(
    family: Family, args: ModelArgs, entries: Mapping[str, TensorEntry], tensors: Iterable[Tensor]
) -> None:
    """Every element goes to one place, but for the rows that pad the vocabulary."""
    regions: dict[str, list[Region]] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            regions.setdefault(piece.key, []).append(piece.region)
    if unknown := sorted(entries.keys() - regions.keys()):
        raise UsageError(
            f"{args.where}: no table of {family.name} has a place for {some(unknown)}; --leave-out "
            "PATTERN leaves tensors out, --format safetensors keeps Megatron's names"
        )
    for key, parts in regions.items():
        shape = entries[key].shape
        if key.endswith(("word_embeddings.weight", "output_layer.weight")):
            shape = (args.vocab_size, *shape[1:])
        fault = tiling_fault(shape, tuple((r.offsets, r.sizes) for r in parts))
        if fault is not None:
            raise UsageError(
                f"{args.where}: {key} {entries[key].shape} does not go into {family.name} whole: "
                f"{fault}; do the args say how many layers and experts there are?"
            )
