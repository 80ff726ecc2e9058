"""A merged checkpoint made again from its sources by a reference of its own, and compared."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from wsm_megatron.checkpoint.common_state import load_common, load_stored, read_common
from wsm_megatron.checkpoint.keys import Role, may_be_padding
from wsm_megatron.checkpoint.layout import METADATA_FILE, Layout, read_layout
from wsm_megatron.checkpoint.reader import CheckpointReader, read_file
from wsm_megatron.checkpoint.region import Region
from wsm_megatron.checkpoint.run_directory import checkpoint_path
from wsm_megatron.checkpoint.state_diff import differences
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import MergeError, UsageError, some
from wsm_megatron.execution.rank import ProgressFactory, default_threads, no_progress
from wsm_megatron.kernels import reference
from wsm_megatron.optimizer.indexed_state import with_names
from wsm_megatron.planning.plan import MergePlan, make_plan
from wsm_megatron.planning.prepare import common_of_merge, find_mains
from wsm_megatron.planning.provenance import AVERAGED, described
from wsm_megatron.planning.tasks import VALUE, Output, Rule, Task
from wsm_megatron.process.worker_threads import run_workers
from wsm_megatron.storage.buffer import Buffer
from wsm_megatron.storage.retry import check_storage

SAMPLE_ELEMENTS = 4096
_TILE_ELEMENTS = 2**20
_NAMED = 5
"""Names in a message."""


def recompute(
    merged: CheckpointReader,
    provenance: dict[str, Any],
    progress: ProgressFactory = no_progress,
    *,
    everything: bool = False,
    run: Path | None = None,
    seed: int = 0,
) -> int:
    """Make a merged checkpoint again from its sources, and compare.

    Its entries, its byte entries and its common state are compared whole; of its tensors every
    element, or some regions of each. Of a checkpoint that was merged inside a run the tensors are
    compared: byte entries, common state and padding Megatron wrote from memory.

    Args:
        progress: shows the bytes that are compared and made again.
        everything: every element, rather than :data:`SAMPLE_ELEMENTS` of every tensor.
        run: where the sources are now, by default where they were.
        seed: of the choice of samples.

    Returns:
        the number of elements compared.

    Raises:
        UsageError: a source is not there, or not what was merged.
        MergeError: what is not the merge of its sources; a source is damaged.
    """
    path = merged.layout.path
    config = _config_of(path, provenance)
    opened = [read_layout(place) for place in _places(path, provenance, run)]
    if config.keeps_optimizer:
        opened = [with_names(layout) for layout in opened]
    sources = [CheckpointReader(layout) for layout in opened]
    merged.layout = merged.layout.named_like(opened[-1])
    try:
        layouts = [source.layout for source in sources]
        flat, kinds = find_mains(config, layouts[-1], layouts[:-1])
        plan = make_plan(layouts, config, flat, kinds)
        in_run = any("metadata_crc32" not in source for source in provenance["sources"])
        if in_run:
            _check_main_params_were_saved(path, plan)
        _check_tensors(merged.layout, plan)
        tasks: Sequence[Task] = plan.tasks
        if not in_run:
            _check_rest(merged, sources[-1], config, provenance)
        else:  # what Megatron wrote was in memory, padding too
            tasks = [task for task in tasks if not _is_padding(task)]
        comparison = _Comparison(merged, sources, provenance["coefficients"])
        parts = list(_all_regions(tasks) if everything else _some_regions(tasks, seed))
        _compare_all(comparison, parts, progress)
        return comparison.elements
    finally:
        for source in sources:
            source.close()


def _places(merged: Path, provenance: dict[str, Any], run: Path | None) -> list[Path]:
    """The sources' directories."""
    sources = provenance["sources"]
    if averaged := [str(s["iteration"]) for s in sources if not AVERAGED.isdisjoint(s)]:
        raise UsageError(
            f"{merged}: iterations {', '.join(averaged)} stand for means over many steps, which "
            "were in the memory of the run, so the merge cannot be made again; without --sources "
            "verify checks all that was written"
        )
    unsaved = [str(source["iteration"]) for source in sources if "path" not in source]
    if unsaved and run is None:
        raise UsageError(
            f"{merged}: iterations {', '.join(unsaved)} were kept in memory by the run and not "
            "saved as checkpoints, so the merge cannot be made again; without --sources verify "
            "checks all that was written. Where they are saved elsewhere, name that run directory "
            "with --sources-from"
        )
    places = [_place(source, run) for source in sources]
    for place, source in zip(places, sources, strict=True):
        if not place.is_dir():
            raise UsageError(
                f"{place}: the source is gone; name the directory that its run has now with "
                "--sources-from, or verify without --sources"
            )
        known = source.get("metadata_crc32")
        if known is not None and f"{crc32(read_file(place / METADATA_FILE)):08x}" != known:
            raise UsageError(
                f"{place} is not the checkpoint that was merged: its .metadata is another one "
                "(saved again since?); verify without --sources"
            )
    return places


def _place(source: dict[str, Any], run: Path | None) -> Path:
    if run is None:
        return Path(source["path"])
    name = Path(source["path"]).name if "path" in source else ""
    return run / name if name else checkpoint_path(run, source["iteration"])


def _config_of(merged: Path, provenance: dict[str, Any]) -> MergeConfig:
    try:
        return MergeConfig.of_record(provenance["options"])
    except UsageError as error:
        raise UsageError(
            f"{merged}: {error}; verify with the version that merged it, or without --sources"
        ) from error


def _check_main_params_were_saved(merged: Path, plan: MergePlan) -> None:
    """A run merges its float32 main params, also where its own checkpoints lack them."""
    rules = {recipe.rule for recipe in plan.recipes}
    weights = {recipe.outputs[-1].dtype for recipe in plan.recipes if recipe.role is Role.MODEL}
    if Rule.SUM_MAIN not in rules and weights & {torch.bfloat16, torch.float16}:
        raise UsageError(
            f"{merged} was merged from the run's float32 main params, which its own checkpoints do "
            "not hold (--no-save-optim), so the merge cannot be made again; without --sources "
            "verify checks all that was written"
        )


def _check_tensors(merged: Layout, plan: MergePlan) -> None:
    """The merge has the planned tensors, and what is compared covers them."""
    expected = {o.key: (o.dtype, o.shape) for r in plan.recipes for o in r.outputs}
    found = {key: (entry.dtype, entry.shape) for key, entry in merged.tensors.items()}
    _compare_names(merged.path, expected.keys(), found.keys())
    for key, kind in expected.items():
        if found[key] != kind:
            raise MergeError(f"{merged.path}: {key} is {found[key]}; its sources make it {kind}")
    covered: Counter[str] = Counter()
    for task in plan.tasks:
        covered.update({output.key: task.region.numel for output in task.recipe.outputs})
    for key, (_, shape) in expected.items():
        if covered[key] != prod(shape):
            raise MergeError(
                f"{merged.path}: the sources make {covered[key]} of the {prod(shape)} elements of "
                f"{key}"
            )


def _compare_names(path: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = (("lacks", missing), ("has in addition", extra))
        said = " and ".join(f"{what} {some(names, _NAMED)}" for what, names in parts if names)
        raise MergeError(f"{path} is not the merge of its sources: it {said}")


def _check_rest(
    merged: CheckpointReader,
    newest: CheckpointReader,
    config: MergeConfig,
    provenance: dict[str, Any],
) -> None:
    """Byte entries, common state and ``metadata.json`` are what the newest source makes them."""
    layout, path = merged.layout, merged.layout.path
    before = load_common(*read_common(newest.layout.path, newest.layout))
    expected = common_of_merge(
        newest.layout, before, config, provenance["iteration"], described(provenance)
    )
    if layout.format is not expected.format:
        raise MergeError(f"{path}: of another format than {newest.layout.path} makes it")
    stored = expected.format.store(expected.state)
    _compare_names(path, (*expected.objects, *stored.entries), layout.objects)
    for key in expected.objects:
        source = newest.layout.objects[key]
        if merged.read_object(layout.objects[key]) != newest.read_object(source):
            raise MergeError(f"{path}: {key} is not that of {newest.layout.path}")
    state = load_common(*read_common(path, layout))
    written = load_stored(stored, "the expected common state")
    if differing := list(differences(state, written)):
        raise MergeError(
            f"{path}: the common state is not what {newest.layout.path} makes it: "
            f"{some(differing, _NAMED)}"
        )
    if layout.mcore_data != newest.layout.mcore_data:
        raise MergeError(f"{path}: mcore_data of .metadata is not that of {newest.layout.path}")
    if layout.marker != (expected.format.marker(newest.layout.marker) or {}):
        raise MergeError(f"{path}: metadata.json is not what {newest.layout.path} makes it")


def _is_padding(task: Task) -> bool:
    region = task.region
    return len(region.offsets) == 1 and all(
        may_be_padding(output.key, region.offsets[0], region.sizes[0])
        for output in task.recipe.outputs
    )


Part = tuple[Task, Region]


def _all_regions(tasks: Iterable[Task]) -> Iterator[Part]:
    return ((task, region) for task in tasks for region in task.region.split(_TILE_ELEMENTS))


def _some_regions(tasks: Iterable[Task], seed: int) -> Iterator[Part]:
    chance = random.Random(seed)
    by_key: dict[str, list[Task]] = {}
    for task in tasks:
        by_key.setdefault(task.recipe.key, []).append(task)
    for of_key in by_key.values():
        task = chance.choice(of_key)
        yield task, chance.choice(list(task.region.split(SAMPLE_ELEMENTS)))


class _Comparison:
    """Regions of a merged checkpoint and of its sources' merge. Safe to share between threads."""

    def __init__(
        self,
        merged: CheckpointReader,
        sources: Sequence[CheckpointReader],
        coefficients: Sequence[float],
    ):
        self._merged, self._sources, self._coefficients = merged, sources, coefficients
        self._lock = threading.Lock()
        self.elements = 0

    def cost(self, part: Part) -> int:
        """Bytes that are read."""
        task, region = part
        return region.numel * task.recipe.cost(len(self._sources), 1)

    def compare(self, part: Part) -> None:
        task, region = part
        expected = self._expected(task, region)
        for output, values in zip(task.recipe.outputs, expected, strict=True):
            stored = self._merged.read(output.key, task.part(output.key, region))
            if not _same(stored, values):
                self._blame_sources(task, region)
                raise MergeError(
                    f"{self._merged.layout.path}: {output.key} at {region.offsets} is not the "
                    "merge of its sources"
                )
        with self._lock:
            self.elements += region.numel * len(expected)

    def _expected(self, task: Task, region: Region) -> list[torch.Tensor]:
        recipe = task.recipe
        if recipe.rule is Rule.COPY:
            return [self._copied(task, region, output) for output in recipe.outputs]
        total: torch.Tensor | None = None
        for coefficient, source in zip(self._coefficients, self._sources, strict=True):
            output = self._summand(task, region, source).double() * coefficient
            total = output if total is None else total.add_(output)
        assert total is not None
        *mains, model = recipe.outputs
        if recipe.splits and recipe.main.rebuilt:
            value = reference.round_once(total, VALUE)
            high, low = reference.split_main(value)
            rounded = high if model.dtype is torch.bfloat16 else value.to(model.dtype)
            return [*(low.to(main.dtype) for main in mains), rounded]
        first = reference.round_once(total, VALUE if recipe.splits else recipe.outputs[0].dtype)
        return [first.to(output.dtype) for output in recipe.outputs]

    def _copied(self, task: Task, region: Region, output: Output) -> torch.Tensor:
        recipe = task.recipe
        key = recipe.copied_from(output)
        read = self._sources[-1].read(key, task.part(key, region)).to(output.dtype)
        zero = recipe.clears or (recipe.main.rebuilt and key != output.key)
        return torch.zeros_like(read) if zero else read

    def _summand(self, task: Task, region: Region, source: CheckpointReader) -> torch.Tensor:
        recipe = task.recipe
        read = [source.read(key, task.part(key, region)) for key in recipe.inputs]
        if recipe.rebuilds:
            main, model = read
            return reference.rebuild_main(model, main)
        return read[0]

    def _blame_sources(self, task: Task, region: Region) -> None:
        """Raise ``MergeError`` where a source is not what it was, by its own CRC-32."""
        for source in self._sources[-1:] if task.recipe.rule is Rule.COPY else self._sources:
            for key in task.recipe.inputs:
                place = task.part(key, region)
                elements = torch.empty(place.numel, dtype=source.layout.tensors[key].dtype)
                reader = source.region_reader(key, place)
                reader.read(place, Buffer(elements))
                reader.finish()
            source.verify()


def _compare_all(comparison: _Comparison, parts: Sequence[Part], progress: ProgressFactory) -> None:
    """On threads."""
    with progress(0, sum(map(comparison.cost, parts))) as bar:

        def compare(part: Part) -> None:
            comparison.compare(part)
            bar(comparison.cost(part))

        run_workers(parts, compare, default_threads(), threading.Event(), check_storage)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same bits, but for those inside a NaN."""
    if torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
        return True
    if not left.is_floating_point():
        return False
    nan = left.isnan()
    left, right = left.masked_fill(nan, 0), right.masked_fill(right.isnan() & nan, 0)
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))
