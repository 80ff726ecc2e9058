"""The merge from which a run goes on after a loss spike.

Pre-trained Model Averaging (PMA, arXiv 2505.12082, "Model Merging in Pre-training of LLMs"): where
a spike has thrown a run off, the mean of the last checkpoints before it is a steadier start than
any one of them.
"""

from __future__ import annotations

from dataclasses import replace

from wsm_megatron.checkpoint.run_directory import scan_run
from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import UsageError

LAST = 3
"""Checkpoints that are merged unless another number is given."""


def before_spike(config: MergeConfig, iteration: int) -> MergeConfig:
    """The merge of the ``last`` checkpoints that were saved before an iteration.

    Args:
        config: with ``load`` and ``last``. iteration: from which on the run is not to be trusted;
            its own checkpoint is left out.

    Raises:
        UsageError: there are fewer checkpoints before.
    """
    finished = scan_run(config.run).finished
    usable = [i for i in finished if i < iteration]
    wanted = config.last or LAST
    if len(usable) < max(wanted, 2):
        have = ", ".join(map(str, usable[-5:])) or "none"
        raise UsageError(
            f"--before {iteration}: {config.run} has {len(usable)} checkpoints before it ({have}), "
            f"and --last {wanted} are to be merged"
        )
    return replace(config, last=wanted, to=usable[-1])


def skip_flag(merged: int, iteration: int) -> tuple[str, str]:
    """Megatron's flags that pass over the batch of an iteration: of core up to 0.16, and later.

    ``--iterations-to-skip`` is compared with the number of iterations done before 0.17, and with
    the one that begins from then on (``train`` in training/training.py).

    Args:
        merged: the iteration that training resumes from. iteration: the first of the spike.
    """
    assert iteration > merged
    return f"--iterations-to-skip {iteration - 1}", f"--iterations-to-skip {iteration}"
