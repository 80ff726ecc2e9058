"""``python -m wsm_megatron.launch pretrain_gpt.py FLAGS``: install the plugin, run the script."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from wsm_megatron.process.streams import open_streams


def main() -> None:
    """Run the script named first on the command line as ``__main__``, as Python itself would."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m wsm_megatron.launch SCRIPT [FLAGS ...]")
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"wsm_megatron.launch: no such script: {script}")
    open_streams()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.resolve().parent))
    from wsm_megatron.plugin.hooks import install

    install()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
