"""Runs a script or a module whose imports of flash_attn and xformers Headway answers, where nothing else can.

python -m headway.shims run [--force] [--as-distribution] script.py [arguments]
python -m headway.shims run [--force] [--as-distribution] -m package.module [arguments]
"""

from __future__ import annotations

import argparse
import runpy
import sys
import traceback
from pathlib import Path

from headway.shims import install


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m headway.shims", usage=_USAGE, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("command", choices=["run"], help="run a script or a module")
    parser.add_argument("--force", action="store_true", help="answer also for packages that run here")
    parser.add_argument("--as-distribution", action="store_true", help="answer also who asks importlib.metadata")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module")
    parser.add_argument("target", help="script.py or package.module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    asked = parser.parse_args(given)
    if not asked.module and not Path(asked.target).exists():
        parser.error(f"got {asked.target}, which is no file; takes a script, or -m and a module")
    for answer in install(force=asked.force, as_distribution=asked.as_distribution):
        print(answer, file=sys.stderr)
    sys.argv = [asked.target, *asked.arguments]
    try:
        _run(asked.target, asked.module)
    except ImportError as error:
        if "FlashAttention" not in str(error) or asked.as_distribution:
            raise
        traceback.print_exc()
        parser.exit(1, "transformers looks for the package before it imports it: run this with --as-distribution\n")


def _run(target: str, module: bool) -> None:
    if module:
        sys.path.insert(0, "")
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(target).resolve().parent))  # as python does it
        runpy.run_path(target, run_name="__main__")


_USAGE = "python -m headway.shims run [--force] [--as-distribution] (script.py | -m package.module) [arguments]"

if __name__ == "__main__":
    main(sys.argv[1:])
