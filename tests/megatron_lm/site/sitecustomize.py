"""First on PYTHONPATH: every rank, and every process that a rank spawns, gets the stand-in."""

import os

if "MEGATRON_LM_ON_CPU" in os.environ and "RANK" in os.environ:
    from tests.megatron_lm import standin

    standin.install()
    if "STANDINS" in os.environ:
        from tests.megatron_lm import standins

        standins.install(os.environ["STANDINS"])
    if "FAULT" in os.environ:
        from tests.megatron_lm import faults

        faults.install(os.environ["FAULT"])
