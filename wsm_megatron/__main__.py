# PYTHON_ARGCOMPLETE_OK
"""The process behind ``wsm`` and ``python -m wsm_megatron``: starts and ends without delay."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import NoReturn

from wsm_megatron.errors import EXIT_FAILED
from wsm_megatron.process.streams import finish, open_streams, say, say_defect


def run() -> NoReturn:
    """Run the command line and end the process.

    Importing torch makes a million objects that live to the end. Collecting garbage among them
    meanwhile, and taking them apart at exit, takes about as long as the import itself.
    """
    status = EXIT_FAILED
    try:
        open_streams()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is told in one line
        gc.disable()
        from wsm_megatron.cli.main import import_command, main

        import_command(sys.argv[1:])
        gc.freeze()
        gc.enable()
        status = main()
    except SystemExit as error:  # argparse: 0 after --help, 2 for a wrong option
        status = error.code if isinstance(error.code, int) else EXIT_FAILED
    except KeyboardInterrupt:
        say("wsm: stopped by SIGINT")
        status = 128 + signal.SIGINT
    except BaseException:
        say_defect()
    finally:
        os._exit(finish(status))


if __name__ == "__main__":
    run()
