"""Without the extras the commands can be asked what they do; one that needs a package names it, and they hold all."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SRC = Path(__file__).parents[3] / "src"
SCRIPT = """
import json, sys
for each in "accelerate matplotlib pyarrow safetensors tensorboard trackio wandb yaml".split():
    sys.modules[each] = None
from typer.testing import CliRunner
from headway_apps.proteins.cli import app
def run(*arguments):
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stderr
names = [each.name for each in app.registered_commands]
calls = [["prepare", "x.fasta", "--out", "x"], ["sample", "model", "--out", "x.fasta"]]
print(json.dumps([[run(each, "--help") for each in names], [run(*each) for each in calls]]))
"""


def test_help_needs_no_extra_and_work_names_the_one_that_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked, called = json.loads(done.stdout)
    assert len(asked) >= 6
    assert asked == [[0, ""]] * len(asked)
    remedy = "pip install '.[proteins]' in Headway's folder"
    assert called == [
        [1, f"error: got no package {package}, which this command takes; {remedy}\n"]
        for package in ("pyarrow", "safetensors")
    ]


def test_an_install_with_the_extra_has_every_package_that_is_imported() -> None:
    """Those of trackers are imported by name, when they are asked for."""
    project = tomllib.loads((SRC.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    has = {re.split(r"\W", each)[0] for each in (*project["dependencies"], *extras["proteins"], *extras["figures"])}
    trees = [ast.parse(each.read_text()) for each in (SRC / "headway_apps").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    taken = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"headway", "headway_apps"}
    assert {"torch", "accelerate"} < taken
    assert {"pyyaml" if each == "yaml" else each for each in taken} <= has
