"""Imports a module in a child process, to see whether it can be: `python -m headway.shims.trial flash_attn`."""

import importlib
import sys

from headway.backends.trial import in_a_line


def _imported(name: str) -> None:
    importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(in_a_line(_imported, *sys.argv[1:]))
