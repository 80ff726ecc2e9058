"""docs/evidence.md, from the data alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.wsm_vs_wsd.claims import CLAIMS, MISSING, VERDICTS
from examples.wsm_vs_wsd.figures import plot_all
from examples.wsm_vs_wsd.more_tables import ABOUT_THE_REST
from examples.wsm_vs_wsd.plan import plan
from examples.wsm_vs_wsd.results import Results
from examples.wsm_vs_wsd.statistics import interval
from examples.wsm_vs_wsd.tables import ABOUT_MERGING, shown
from examples.wsm_vs_wsd.text import NOISY_BYTES, NOISY_SAMPLES


def write_page(data: dict[str, Any], docs: Path) -> Path:
    """The page and its figure; returns the page's path."""
    results = Results(data)
    docs.mkdir(parents=True, exist_ok=True)
    plot_all(results, docs / "evidence.png")
    path = docs / "evidence.md"
    text = "\n".join((*_head(results), *_claims(results), *_figure(), *_tables(results)))
    path.write_text(text.rstrip("\n") + "\n")
    return path


def _head(r: Results) -> Iterator[str]:
    p = r.profile
    yield "# Evidence: does merging do what a decay does?\n"
    if p.name == "ci":
        yield "**Made from a `ci` run: a few steps of a toy. It shows the layout and no more.**\n"
    yield (
        "Made by `python -m examples.wsm_vs_wsd page` from `examples/wsm_vs_wsd/data/`; do not edit"
        " it. The question is the WSM paper's (arXiv 2507.17634: 16.3B parameters, 10T tokens), "
        "asked small: real megatron-core on CPU ranks, bf16 with float32 main params, text of"
        " Python's standard library, byte by byte.\n"
    )
    yield from _setting(r)
    yield from _runs(r)


def _setting(r: Results) -> Iterator[str]:
    p = r.profile
    noise = f"{NOISY_BYTES:.0%} of the bytes of {NOISY_SAMPLES:.0%} of the samples are random"
    yield (
        f"- **Model**: 2 layers × {p.hidden}, sequence {p.seq_length}, batch {p.batch}, AdamW, LR"
        f" {p.lr:g} (and {p.second_lr:g}), {p.warmup} steps of warm-up. The MoE has {p.experts}"
        " experts, 2 a token, sigmoid router, expert bias."
    )
    yield (
        f"- **Runs**: {p.steps} steps; a point of the path every {p.interval}, block means of every"
        f" {p.block_every}th step; decays go to 0 by Megatron's WSD schedule. Noisy text: {noise};"
        f" that run has {p.noisy_steps} steps, the MoE's {p.moe_steps}."
    )
    seeds = ", ".join(map(str, p.seeds))
    yield (
        f"- **Statistics**: seeds {seeds}, of initial weights and order of the data, the same in"
        " all arms; `mean ± half the 95 % t-interval` of paired differences, not corrected for"
        " their number. Losses are nats a byte on the test split,"
        f" {p.batches * p.batch} windows, which no selection has seen; selections are made on the"
        " validation split."
    )
    yield f"- **Is it a plateau?** {_plateau(r)}\n"


def _plateau(r: Results) -> str:
    curves = [arm["curve"] for arm in r.arms("main").values()]
    if not curves:
        return "Not run."
    steps = list(curves[0])
    late = steps[len(steps) * 3 // 4]
    whole = interval([c[steps[0]] - c[steps[-1]] for c in curves])
    last = interval([c[late] - c[steps[-1]] for c in curves])
    return (
        f"From step {steps[0]} to {steps[-1]} the validation loss falls by"
        f" {shown(whole, sign=False)}, of that in the last quarter, from {late}, by"
        f" {shown(last, sign=False)}."
    )


def _runs(r: Results) -> Iterator[str]:
    done, planned = len(r.data["arms"]), len(plan(r.profile))
    seconds = sum(arm["seconds"] for arm in r.data["arms"].values())
    bits = [arm["same_bits"] for arm in r.data["arms"].values() if arm.get("same_bits") is not None]
    hours = f"{seconds / 3600:.1f} core hours"
    yield f"{done} of {planned} arms of the profile `{r.profile.name}`, {hours}:\n"
    for run in r.data["runs"]:
        hardware, versions = run["hardware"], run["versions"]
        dirty = ", with uncommitted changes" if run["uncommitted"] else ""
        yield f"- {run['started']}, commit {run['commit'][:12]}{dirty}: `{run['command']}`;"
        yield f"  {hardware['cores']} cores, {hardware['cpu']}; " + ", ".join(
            f"{name} {version}" for name, version in versions.items()
        )
    yield (
        f"\nMerges that are trained on were made by `wsm_megatron.merge` and loaded by Megatron;"
        f" {sum(bits)} of {len(bits)} had the bits of the merge in memory that all others are.\n"
    )


def _claims(r: Results) -> Iterator[str]:
    yield "## Claim by claim\n"
    yield "| claim | paper | here | verdict at this scale |"
    yield "|---|---|---|---|"
    found = [(claim, *claim.ours(r)) for claim in CLAIMS]
    counted = Counter(verdict for _, _, verdict in found)
    for claim, ours, verdict in found:
        shown_ours = ours if verdict != MISSING else "–"
        yield f"| {claim.what} | {claim.paper} | {shown_ours} | {verdict} |"
    sums = ", ".join(f"{counted[one]} {one}" for one in VERDICTS if counted[one])
    yield f"\nIn sum: {sums}.\n"
    yield (
        "Verdicts follow from the intervals: *reproduced* or *not reproduced* where the interval"
        " leaves out 0, *undecided* otherwise. Parity is at least 90 % of the decay's gain, by the"
        " whole interval; merging and decaying add up where together they gain a tenth"
        " of it more.\n"
    )
    yield "Why they may differ:\n"
    for claim, _, verdict in found:
        if verdict != MISSING:
            yield f"- *{claim.what}.* {claim.why}"
    yield ""


def _figure() -> Iterator[str]:
    panels = "plateau, merge against decay, duration, granularity, distance, too early"
    yield f"![Six panels: {panels}](evidence.png)\n"
    yield "Means over seeds; bars are 95 % t-intervals, of paired differences but for the first.\n"


def _tables(r: Results) -> Iterator[str]:
    yield "## Tables\n"
    for table in (*ABOUT_MERGING, *ABOUT_THE_REST):
        yield from table(r).markdown()
    yield "## Run it\n"
    yield "    pip install '.[megatron,plot]'"
    yield "    python -m examples.wsm_vs_wsd run hour --out evidence-out --minutes 50"
    yield "    python -m examples.wsm_vs_wsd page --out evidence-out\n"
    yield (
        "`night` has ten seeds and twice the steps, `ci` takes a minute. A run that was stopped"
        " goes on when the command is given again; arms come in the order of the questions, seed"
        " after seed, so what did not fit into the time is whole questions at the end."
        " `examples/wsm_vs_wsd/gpu.sh` is the main comparison for a model of 250M parameters on one"
        " GPU, with `pretrain_gpt.py`; it has not been run.\n"
    )
