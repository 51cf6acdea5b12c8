"""What trials have shown is kept between processes; what cannot be kept or read costs a trial and nothing else."""

from __future__ import annotations

import dataclasses
import multiprocessing
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from choice.machines import B200, H100, with_version

from headway.choice import memory
from headway.choice.memory import folder, recall, remember

UNKNOWN = (False, None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("broken", [None, "ImportError: undefined symbol", "“quoted” — and more\nlines"])
def test_recalls_what_it_was_told(broken: str | None) -> None:
    assert recall(H100, "flash-attn 2.8.3") == UNKNOWN
    assert remember(H100, "flash-attn 2.8.3", broken)
    assert recall(H100, "flash-attn 2.8.3") == (True, broken)
    assert recall(H100, "flash-attn 2.8.4") == UNKNOWN


@pytest.mark.parametrize(
    "other",
    [B200, with_version(H100, torch="2.14.0"), with_version(H100, driver="13.1"), with_version(H100, cudnn="9.26.0")],
)
def test_another_gpu_torch_driver_or_cudnn_is_another_machine(other: object) -> None:
    remember(H100, "xformers 0.0.35", None)
    assert recall(other, "xformers 0.0.35") == UNKNOWN  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"broken": 3}', '{"other": null}', "\x00\xff", '"broken"'])
def test_what_cannot_be_read_is_unknown_and_told_anew(text: str, cache: Path) -> None:
    remember(H100, "xformers 0.0.35", None)
    (file,) = folder(H100).iterdir()
    file.write_text(text, encoding="latin-1")
    assert recall(H100, "xformers 0.0.35") == UNKNOWN
    assert remember(H100, "xformers 0.0.35", "it crashed")
    assert recall(H100, "xformers 0.0.35") == (True, "it crashed")


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    (cache / "headway").write_text("a file where the folder should be")
    assert not remember(H100, "xformers 0.0.35", None)
    assert recall(H100, "xformers 0.0.35") == UNKNOWN


def test_names_become_file_names(cache: Path) -> None:
    odd = dataclasses.replace(H100, name="../../NVIDIA GeForce RTX™ 5090/D")
    remember(odd, "a/b ../c", None)
    assert recall(odd, "a/b ../c") == (True, None)
    (file,) = (path for path in cache.rglob("*") if path.is_file())
    assert file.parent.parent == cache / "headway"


def _tell(number: int) -> None:
    for round_ in range(50):
        assert remember(H100, f"fact {number}", f"round {round_}")
        assert remember(H100, "shared", f"from {number}")
        known, said = recall(H100, "shared")
        assert known
        assert (said or "").startswith("from ")


def test_processes_that_write_at_once_lose_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads; these children only write files
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=_tell, args=(number,)) for number in range(3)]
        for child in children:
            child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert [recall(H100, f"fact {number}") for number in range(3)] == [(True, "round 49")] * 3
    assert not list(folder(H100).glob("*.tmp"))


def test_threads_that_write_at_once_lose_nothing() -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_tell, range(4)))
    assert [recall(H100, f"fact {number}") for number in range(4)] == [(True, "round 49")] * 4
