"""One rank: ``python -m examples.cpu_ranks.rank CALL RESULT`` started by launch.py.

CALL is a pickle of ``(module, function, kwargs)``; the function's result is pickled to RESULT.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any


def run(call: Path) -> Any:
    """Join the gloo group of all ranks, call the function, leave the group."""
    import torch.distributed as dist

    module, function, kwargs = pickle.loads(call.read_bytes())
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    result = getattr(importlib.import_module(module), function)(**kwargs)
    dist.barrier()
    dist.destroy_process_group()
    return result


def main() -> int:
    call, result = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        outcome = run(call)
    except BaseException:
        # Exits at once: the other ranks would only add their lost connections.
        traceback.print_exc()
        return 1
    result.write_bytes(pickle.dumps(outcome))
    return 0


# Also in the processes that a rank spawns, which import this module as __mp_main__.
if __name__ in ("__main__", "__mp_main__"):
    gc.disable()  # what is imported stays
    import torch

    from examples.cpu_ranks import cuda_standin

    torch.set_num_threads(1)
    if "CUDA_STANDIN" in os.environ:
        cuda_standin.install()
    gc.freeze()
    gc.enable()

if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking torch apart takes a second; launch.py ends what a rank has spawned
