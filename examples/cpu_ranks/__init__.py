"""Real megatron-core on gloo ranks of one machine, without CUDA.

A GPT of megatron-core's own local layers, its DDP, its (distributed) optimizer and its
``dist_checkpointing``, in processes small enough for a laptop. The demo trains with it and the
test suite uses it as its test bed.

    config.py        GPTConfig: the model, its parallel layout, its optimizer
    launch.py        run_ranks(): start n ranks, collect their results or their traceback
    server.py        the process that has imported megatron-core and forks the ranks
    rank.py          what runs in each rank process
    cuda_standin.py  the names of torch.cuda that megatron-core needs, answered by the CPU
    fused_adam.py    the optimizer megatron-core would take from Transformer Engine or Apex
    training.py      build(), train(), evaluate()
    checkpoint.py    save_checkpoint(), load_checkpoint() in Megatron-LM's layout

Only ``config`` and ``launch`` may be imported outside a rank process: the others import
megatron-core and expect ``cuda_standin.install()`` to have run.
"""

from examples.cpu_ranks.config import GPTConfig
from examples.cpu_ranks.launch import RankError, run_ranks

__all__ = ["GPTConfig", "RankError", "run_ranks"]
