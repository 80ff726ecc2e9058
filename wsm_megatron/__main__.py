"""``python -m wsm_megatron``: the same as ``wsm``."""

import sys

from wsm_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
