"""What resuming from a merge costs: the loss after it, for every policy on optimizer state.

``python -m examples.demo.resume`` trains the demo's model at a constant LR, merges the last
checkpoints with ``--optimizer-state last``, ``merge`` and ``drop``, and trains on from each merge,
on the same data as from the unmerged checkpoint with and without its optimizer state.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from examples.cpu_ranks import run_ranks
from examples.demo.ranks import train_and_save
from examples.demo.resume_ranks import Branch, Curve, continue_from
from wsm_megatron import MergeConfig, merge

_RANKS = 2
_SPIKE_STEPS = 50


def main() -> None:
    arguments = _parser().parse_args()
    out: Path = arguments.out
    if out.exists():
        shutil.rmtree(out)
    started = time.monotonic()
    run_ranks(
        train_and_save,
        _RANKS,
        out / "logs",
        timeout=3600,
        echo=True,
        root=out / "run",
        steps=arguments.steps,
        save_interval=arguments.save_interval,
    )
    branches = _branches(out, arguments.num)
    curves = run_ranks(
        continue_from,
        _RANKS,
        out / "logs",
        timeout=3600,
        echo=True,
        branches=branches,
        steps=arguments.more,
    )[0]
    found = {branch.name: curve for branch, curve in zip(branches, curves, strict=True)}
    (out / "resume.json").write_text(json.dumps({k: asdict(v) for k, v in found.items()}, indent=1))
    print("\n".join(("", *table(found), "")))
    plot(found, out / "resume.png")
    print(f"{out / 'resume.png'}   {time.monotonic() - started:.0f} s in all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.demo.resume", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("resume-out"), help="replaced if there")
    parser.add_argument("--steps", type=int, default=400, help="before the merge")
    parser.add_argument("--save-interval", type=int, default=25)
    parser.add_argument("--num", type=int, default=4, help="checkpoints merged")
    parser.add_argument("--more", type=int, default=100, help="steps after it")
    return parser


def _branches(out: Path, num: int) -> list[Branch]:
    branches = [
        Branch(name="unmerged", root=out / "run", load_optim=True),
        Branch(name="unmerged, --no-load-optim", root=out / "run", load_optim=False),
    ]
    for policy in ("last", "merge", "drop"):
        root = out / f"merged-{policy}"
        merge(
            MergeConfig(load=out / "run", save=root, last=num, decay="mean", optimizer_state=policy)
        )
        name = f"merged, moments {policy}" if policy != "drop" else "merged, state dropped"
        branches.append(Branch(name=name, root=root, load_optim=policy != "drop"))
    return branches


def table(found: dict[str, Curve]) -> Iterator[str]:
    """TaskAssignment-out losses, and the training loss against going on unmerged."""
    unmerged = found["unmerged"]
    steps = list(unmerged.held_out)
    head = "".join(f"{step:>9}" for step in steps)
    yield f"{'held-out loss after step':<28}{head}{'spike':>9}{'at step':>9}"
    for name, curve in found.items():
        losses = "".join(f"{curve.held_out[step]:>9.4f}" for step in steps)
        height, where = spike(curve, unmerged)
        yield f"{name:<28}{losses}{height:>+9.4f}{where:>9}"


def spike(curve: Curve, unmerged: Curve) -> tuple[float, int]:
    """Largest excess of the training loss over going on unmerged, batch by batch; and its step."""
    pairs = zip(curve.training[:_SPIKE_STEPS], unmerged.training[:_SPIKE_STEPS], strict=True)
    excess = [one - other for one, other in pairs]
    height = max(excess)
    return height, excess.index(height) + 1


def plot(found: dict[str, Curve], path: Path) -> None:
    """Training loss against going on unmerged, and held-out loss, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    base = found["unmerged"].training
    colours = ("0.35", "tab:red", "tab:blue", "tab:green", "tab:orange")
    for (name, curve), colour in zip(found.items(), colours, strict=True):
        excess = [a - b for a, b in zip(curve.training, base, strict=True)][:_SPIKE_STEPS]
        left.plot(range(1, len(excess) + 1), excess, color=colour, linewidth=1.3, label=name)
        right.plot(
            list(curve.held_out), list(curve.held_out.values()), color=colour, marker="o",
            markersize=3, linewidth=1.3, label=name,
        )  # fmt: skip
    left.set_title("Training loss against going on unmerged, same batches")
    left.set_ylabel("difference (nats a byte)")
    right.set_title("TaskAssignment-out loss")
    right.set_ylabel("nats a byte")
    for axes in (left, right):
        axes.set_xlabel("steps after the checkpoint")
        axes.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
