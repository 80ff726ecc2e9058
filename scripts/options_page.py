"""Print docs/options.md, made from the fields that the options are.

python scripts/options_page.py > docs/options.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from wsm_megatron.cli.export import EXPORT_OPTIONS
from wsm_megatron.cli.export import JOB_OPTIONS as EXPORT_JOB
from wsm_megatron.cli.merge import JOB_OPTIONS
from wsm_megatron.cli.rescue import RESCUE_OPTIONS
from wsm_megatron.cli.search import SEARCH_OPTIONS
from wsm_megatron.cli.sweep import SWEEP_OPTIONS
from wsm_megatron.options import Option
from wsm_megatron.plugin.arguments import OPTIONS as TRAINING
from wsm_megatron.process.timeouts import VARIABLE

TOP = """\
# Options

Made by `scripts/options_page.py` from the options themselves; `wsm merge --help` says the same.

Whole numbers may be written `20000`, `20_000`, `20k`, `500M`, `2.5B` or `1e9`, sizes `256MiB` or
`2GB`, fractions `0.25`, `1/4` or `25%`.
"""

MERGE = """\
## `wsm merge`, `wsm plan`

`--config job.yaml` reads options from a YAML file. Its keys are the names of the flags, with
underscores or hyphens, and its values are written as after the flags; `null` leaves the default,
paths are relative to the working directory. Flags win over the file.

    load: /checkpoints/run
    save: /checkpoints/merged
    window_tokens: 2B
    decay: 1-sqrt
    optimizer_state: last
    copy: ["*expert_bias*"]

In Python these options are the fields of `MergeConfig` (what is merged) and `ExecutionOptions` (how
the job runs, the last table): `merge(MergeConfig(load="RUN", save="OUT", last=8),
ExecutionOptions(threads=8))`. `wsm_merge.json` records all of `MergeConfig` but the two places, and
nothing of `ExecutionOptions`.
"""

EXPORT = """\
## `wsm export CHECKPOINT`

[export.md](export.md) says which models and how. `wsm merge` has the same options beside
`--export`, but for `--format` and `--save`. In Python they are the fields of `ExportConfig`.
"""

SWEEP = """\
## `wsm sweep`

Every combination of these is one merge, and all merges are made of one read ([sweep.md](sweep.md)).
Beside them it takes the options of `wsm merge` that all merges have in common.
"""

SEARCH = """\
## `wsm search`

Beside these it takes the options of `wsm merge` that choose checkpoints, and those that say how
they are merged, but for the coefficients.
"""

RESCUE = """\
## `wsm rescue`

Merges the checkpoints before a spike ([diagnostics.md](diagnostics.md)). Beside this it takes
options of `wsm merge`, with other defaults: `--last 3 --decay mean --optimizer-state last`.
"""

TRAIN = """\
## Training: `--wsm-merge-*`

[plugin.md](plugin.md) says what happens when. The keys of `--wsm-merge-config` are these names
without `--wsm-merge-`; in Python they are the fields of `WSMConfig`.
"""

RENAMED = """\
## Old names

Understood for one release, with a notice in the log.
"""

ENVIRONMENT = """\
## Environment

Nothing needs to be set by hand on a cluster: launchers set what `wsm merge` and `wsm plan` read.
`scripts/merge.sbatch` and `scripts/pretrain_wsm.sbatch` list their own settings at their head.
"""

VARIABLES = (
    (
        "RANK, WORLD_SIZE, LOCAL_RANK, TORCHELASTIC_*",
        "torchrun, job operators",
        "which rank this is, and of how many",
    ),
    ("OMPI_COMM_WORLD_*, MV2_COMM_WORLD_*, PMI_*, MPI_LOCAL*", "mpirun", "the same"),
    (
        "SLURM_PROCID, SLURM_LOCALID, SLURM_JOB_ID, SLURM_STEP_*",
        "srun",
        "the same, and where rank 0 is",
    ),
    (
        "MASTER_ADDR, MASTER_PORT",
        "torchrun, or by hand",
        "where rank 0 listens; they win over what Slurm or MPI say",
    ),
    (
        "LOCAL_WORLD_SIZE",
        "torchrun",
        "ranks of a training job that share the cores and the memory of a host",
    ),
    (
        "SLURM_CLUSTER_NAME, SLURM_RESTART_COUNT",
        "Slurm",
        "whether the job that holds a lock still runs",
    ),
    ("SLURM_ARRAY_TASK_ID", "Slurm", "in the event log"),
    (VARIABLE, "by hand", "how long a job waits for what: `lost_after=60,stalled_after=900`"),
    ("GLOO_SOCKET_IFNAME", "by hand", "network interface of the sums of --node-local"),
    ("TORCH_CPP_LOG_LEVEL", "by hand", "what torch's C++ code logs (ERROR where it is not set)"),
)
"""What the environment says, who sets it, and what for."""


def main() -> None:
    """Print the page."""
    sections = [TOP, MERGE]
    for title in dict.fromkeys(one.group for one in JOB_OPTIONS):
        options = [one for one in JOB_OPTIONS if one.group == title]
        sections.append(f"### {title[0].upper()}{title[1:]}\n\n{described(options)}")
    for head, options in ((SWEEP, SWEEP_OPTIONS), (SEARCH, SEARCH_OPTIONS)):
        sections += [head, described([one for one in options if one not in JOB_OPTIONS])]
    known = {one.name for one in JOB_OPTIONS}
    sections += [RESCUE, described([one for one in RESCUE_OPTIONS if one.name not in known])]
    old = [one for one in (*JOB_OPTIONS, *TRAINING) if one.old_flag is not None]
    sections += [EXPORT, described((*EXPORT_OPTIONS, *EXPORT_JOB))]
    sections += [TRAIN, described(TRAINING)]
    sections += [RENAMED, table(("old", "now"), [(f"`{o.old_flag}`", f"`{o.flag}`") for o in old])]
    sections += [
        ENVIRONMENT,
        table(("variables", "set by", ""), [_variables(*one) for one in VARIABLES]),
    ]
    print("\n".join(sections), end="")


def described(options: Sequence[Option]) -> str:
    """A table of options."""
    rows = [(f"`{_usage(one)}`", _text(one.said_default), _text(one.help)) for one in options]
    return table(("option", "default", ""), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _usage(one: Option) -> str:
    value = r"\|".join(one.kind.choices) or one.metavar or one.kind.metavar or ""
    return f"{one.flag} {value}".strip()


def _variables(names: str, setter: str, meaning: str) -> tuple[str, str, str]:
    return f"`{names.replace(', ', '`, `')}`", setter, _text(meaning)


def _text(text: str) -> str:
    """With flags and patterns in it as they are."""
    return re.sub(r"--[a-z-]+", r"`\g<0>`", text.replace("|", r"\|"))


if __name__ == "__main__":
    main()
