"""``wsm plot``: pictures, as PNG or SVG."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wsm_megatron.cli import coefficients as coefficients_command
from wsm_megatron.cli.command import Answer, add
from wsm_megatron.cli.examples import epilog
from wsm_megatron.cli.reporting import common_run, own_selection
from wsm_megatron.errors import UsageError
from wsm_megatron.inspection.inspect import inspect_run
from wsm_megatron.inspection.trajectory import NAME, read_trajectory
from wsm_megatron.options import local_path, typed
from wsm_megatron.pictures.coefficients import draw_coefficients
from wsm_megatron.pictures.run import draw_run
from wsm_megatron.pictures.style import check_format, drawing, save
from wsm_megatron.pictures.sweep import draw_sweep
from wsm_megatron.pictures.trajectory import draw_trajectory
from wsm_megatron.sweeps.manifest import SweepManifest
from wsm_megatron.sweeps.metric import metrics_of
from wsm_megatron.sweeps.selection import select_merges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_path = typed(local_path)


def add_plot(commands: Any, help: str) -> None:
    """Add the command, with one of its own for each kind of picture."""
    command = commands.add_parser(
        "plot",
        help=help,
        description=help,
        epilog=epilog("plot"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = command.add_subparsers(dest="kind", required=True, metavar="KIND")
    coefficients = _add(kinds, "coefficients", _coefficients, "what decays weigh, and their LR")
    coefficients_command.add_choice(coefficients)
    run = _add(kinds, "run", _run, "learning rate, checkpoints and their scores")
    run.add_argument("directory", type=_path, metavar="RUN")
    _add_scores(run)
    sweep = _add(kinds, "sweep", _sweep, "scores of the merges of a sweep")
    sweep.add_argument("manifest", type=_path, metavar="OUT/sweep.json")
    _add_scores(sweep)
    found = _add(kinds, "trajectory", _trajectory, "the path of a run: distances, steps, decays")
    found.add_argument(
        "file", type=_path, metavar="trajectory.json",
        help="of wsm inspect RUN --trajectory --out DIR, or of a merge or sweep with --trajectory; "
        "or the folder that it is in",
    )  # fmt: skip


def _add(
    kinds: Any, name: str, draw: Callable[[argparse.Namespace], Figure], help: str
) -> argparse.ArgumentParser:
    def run(arguments: argparse.Namespace) -> Answer:
        check_format(arguments.out)
        with drawing():
            save(draw(arguments), arguments.out)
        out = str(arguments.out)
        return Answer([f"picture: {out}"], lambda: {"picture": out})

    kind = add(kinds, name, run, help, of="plot")
    kind.add_argument(
        "--out", type=_path, required=True, metavar="FILE.png|.svg", help="where the picture goes"
    )
    return kind


def _add_scores(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--scores", type=_path, action="append", default=[], metavar="FILE",
        help="CSV or JSON, as for wsm select (repeatable)",
    )  # fmt: skip
    command.add_argument("--metric", metavar="NAME", help="which of them (default: loss)")


def _coefficients(arguments: argparse.Namespace) -> Figure:
    return draw_coefficients(coefficients_command.chosen_decays(arguments))


def _run(arguments: argparse.Namespace) -> Figure:
    if not arguments.scores:
        return draw_run(inspect_run(arguments.directory))
    metrics = metrics_of(arguments.metric or "loss")[:1]
    found = select_merges(metrics, arguments.scores, load=arguments.directory)
    name = metrics[0].name
    scores = {one.candidate.iteration: one.scores[name] for one in found.checkpoints}
    return draw_run(inspect_run(arguments.directory), scores, name)


def _sweep(arguments: argparse.Namespace) -> Figure:
    manifest = arguments.manifest
    if arguments.scores:
        metrics = metrics_of(arguments.metric or "loss")[:1]
        found = select_merges(metrics, arguments.scores, manifest, common_run(manifest))
    elif (own := own_selection(manifest, arguments.metric)) is not None:
        found = own
    else:
        raise UsageError(f"{manifest}: the sweep has scored nothing; give --scores FILE")
    metric = found.metrics[0]
    return draw_sweep(
        SweepManifest.read(manifest).merges,
        {one.candidate.path: one.scores[metric.name] for one in found.merges},
        metric,
        {one.candidate.iteration: one.scores[metric.name] for one in found.checkpoints},
    )


def _trajectory(arguments: argparse.Namespace) -> Figure:
    file = arguments.file
    path = file / NAME if file.is_dir() else file
    if not path.is_file():
        raise UsageError(f"{path}: no such file; wsm inspect RUN --trajectory --out DIR writes one")
    return draw_trajectory(read_trajectory(path))
