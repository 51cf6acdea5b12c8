"""Child processes that end well, fail, crash, hang and run out of memory. None of them imports torch, to be quick."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from headway.choice.child import LONGEST, Outcome, run

MODULES = {
    "ends_well": "import sys; print('much to say', 'x' * 100_000)",
    "fails": "import sys\nprint('a warning', file=sys.stderr)\nraise ImportError('undefined symbol: _ZN3c10')",
    "says_why": "import sys; sys.exit('its answer is off by 0.3')",
    "says_nothing": "import sys; sys.exit(3)",
    "says_too_much": "import sys; sys.exit('x' * 10_000)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "is_killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "is_out_of_memory": "raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')",
    "hangs": "import time; time.sleep(60)",
    "hangs_with_a_child": "import subprocess; subprocess.run(['sleep', '60'])",
    "sees": "import sys; sys.exit(' '.join(sys.argv[1:]))",
}

OUTCOMES = {
    "ends_well": Outcome(None),
    "fails": Outcome("ImportError: undefined symbol: _ZN3c10"),
    "says_why": Outcome("its answer is off by 0.3"),
    "says_nothing": Outcome("exit code 3"),
    "says_too_much": Outcome("x" * LONGEST),
    "crashes": Outcome("crashed with SIGSEGV"),
    "is_killed": Outcome("crashed with SIGKILL", lasting=False),
    "is_out_of_memory": Outcome("RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB", lasting=False),
    "no_such_module": Outcome("No module named no_such_module"),
}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found as this process finds its own: the child gets its import path."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("module, outcome", OUTCOMES.items(), ids=OUTCOMES)
def test_outcome(module: str, outcome: Outcome) -> None:
    found = run(module, seconds=30)
    if module == "no_such_module":
        assert found.broken is not None
        assert found.broken.endswith("No module named no_such_module")
    else:
        assert found == outcome


@pytest.mark.parametrize("module", ["hangs", "hangs_with_a_child"])
def test_a_child_that_hangs_is_ended_with_all_its_own(module: str) -> None:
    start = time.monotonic()
    assert run(module, seconds=0.5) == Outcome("no answer within 0.5 s", lasting=False)
    assert time.monotonic() - start < 20


def test_arguments_arrive() -> None:
    assert run("sees", "flash4", "cuda:0", seconds=30) == Outcome("flash4 cuda:0")
