"""The process behind ``wsm`` and ``python -m wsm_megatron``: starts and ends without delay."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line and end the process.

    Importing torch makes a million objects that live to the end. Collecting garbage among them
    meanwhile, and taking them apart at exit, takes about as long as the import itself.
    """
    gc.disable()
    from wsm_megatron.cli import main

    gc.freeze()
    gc.enable()
    try:
        status = main()
    except SystemExit as error:  # argparse: 0 after --help, 2 for a wrong option
        status = error.code if isinstance(error.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
