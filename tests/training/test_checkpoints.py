"""What can be seen is whole, comes back to the bit, and is refused by name where it is damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fresh
from torch import Tensor, nn

from headway import RequestError
from headway_apps.training import checkpoints, folders
from headway_apps.training.checkpoints import Checkpoints
from headway_apps.training.errors import CheckpointError

STATE = {
    "rng": [2**63, 2**64 - 1],
    "place": {"at": 3, "text": "ü\u2028"},
    "best": math.inf,
    "rate": 0.1 + 0.2,
    "no": None,
}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(4, 3, generator=made), "bias": torch.randn(3, generator=made)}


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """Steps 1, 2 and 3."""
    there = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        there.save(step, {"model": tensors(step), "average": tensors(-step)}, {"at": step})
    return there


def as_bytes(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous().view(-1).view(torch.uint8)


def same(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(
        (x.dtype, x.shape) == (those[name].dtype, those[name].shape) and as_bytes(x).equal(as_bytes(those[name]))
        for name, x in these.items()
    )


# -- what was saved comes back ----------------------------------------------------------------------------------------


def test_tensors_state_and_score_come_back_as_they_were(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path / "a" / "b")
    path = there.save(7, {"model": tensors(), "none": {}}, STATE, 0.25)
    assert path == tmp_path / "a" / "b" / "step-000000007"
    assert sorted(each.name for each in path.iterdir()) == ["model.safetensors", "none.safetensors", "state.json"]
    found = Checkpoints(there.folder).at(7)
    assert (found.step, found.state, found.score, [*found.files]) == (7, STATE, 0.25, ["model", "none"])
    assert same(found.tensors("model"), tensors())
    assert found.tensors("none") == {}


ONE = torch.arange(6.0)
KINDS: dict[str, dict[str, Tensor]] = {
    **{str(dtype): {"x": torch.tensor([0, 1, 3, 1]).to(dtype)} for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
        torch.float64, torch.float8_e4m3fn,
    )},
    "no axes": {"x": torch.tensor(3.5)},
    "empty": {"x": torch.empty(0, 4)},
    "strided": {"x": torch.randn(3, 4).t(), "y": torch.randn(9)[::2], "z": torch.randn(3, 1).expand(3, 5)},
    "tied": {"x": ONE, "y": ONE, "z": ONE[1:4], "w": ONE.view(2, 3)},
    "parameter": {"x": nn.Parameter(torch.randn(3))},
    "not numbers": {"x": torch.tensor([math.nan, math.inf, -0.0])},
    "negated": {"x": torch._neg_view(torch.randn(3))},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    there = Checkpoints(tmp_path)
    there.save(1, {"x": KINDS[kind]}, {})
    assert same(there.at(1).tensors("x", torch.device("cpu")), {k: x.detach() for k, x in KINDS[kind].items()})


def test_nothing_is_pickled(kept: Checkpoints) -> None:
    assert {each.suffix for each in kept.folder.rglob("*") if each.is_file()} == {".safetensors", ".json"}


class Shard(Tensor):
    """As DTensor is a subclass, of which this process holds a part."""


@pytest.mark.parametrize(
    "given, says",
    [
        ({"files": {"../x": {}}}, "got a file named '../x'"),
        ({"files": {"": {}}}, "got a file named ''"),
        (
            {"files": {"m": {"w": torch.ones(2).as_subclass(Shard)}}},
            "got 'w' of 'm', a Shard, takes real, dense, whole",
        ),
        ({"files": {"m": {"w": 3}}}, "got 'w' of 'm', a int"),
        ({"files": {"m": {"w": torch.ones(2, device="meta")}}}, "which is on meta"),
        ({"files": {"m": {"w": torch.eye(2).to_sparse()}}}, "which is torch.sparse_coo"),
        ({"files": {"m": {"w": torch.ones(2, dtype=torch.complex128)}}}, "of torch.complex128"),
        ({"state": {"place": (1, 2)}}, "got 'place' of tuple in the state, takes what JSON gives back unchanged"),
        ({"state": {"x": {1: 2}}}, "got 'x' of dict"),
        ({"state": {"x": math.nan}}, "got 'x' of float"),
        ({"state": {"x": torch.ones(2)}}, "got 'x' of Tensor .* give tensors as a file"),
        ({"state": {3: 4}}, "got 3 of int"),
        ({"score": math.nan}, "got score nan, takes a number, or None"),
        ({"step": -1}, "got step -1, takes 0 or more"),
    ],
)
def test_what_would_not_come_back_is_refused_before_anything_is_written(
    given: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=says):
        Checkpoints(tmp_path).save(**{"step": 1, "files": {}, "state": {}, **given})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_is_saved_once_and_in_order(step: int, kept: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match=f"got step {step} for .*, which has step 3, takes a later one; `rewind`"):
        kept.save(step, {}, {})
    assert same(kept.at(step).tensors("model"), tensors(step))


# -- which are there --------------------------------------------------------------------------------------------------


def test_where_there_is_none_there_is_no_latest_and_no_best(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path / "nowhere")
    assert (there.steps(), there.latest(), there.best()) == ([], None, None)
    with pytest.raises(CheckpointError, match="got step 3 of .*, takes one of none: it has no step"):
        there.at(3)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(kept: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match=r"got step 4 of .*, takes one of \[1, 2, 3\]"):
        kept.at(4)


def test_an_unknown_file_is_refused_with_those_that_are(kept: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="got 'ema' of .*step-000000003, takes one of model, average"):
        kept.at(3).tensors("ema")


@pytest.mark.parametrize(
    "keep, scores, left, best",
    [
        (2, [None] * 5, [4, 5], None),
        (1, [None] * 3, [3], None),
        (2, [3.0, 1.0, 2.0, 5.0, 4.0], [2, 4, 5], 2),
        (2, [1.0, 1.0, 1.0, 1.0], [1, 3, 4], 1),
        (2, [5.0, 4.0, 3.0, 2.0], [3, 4], 4),
        (1, [3.0, None, None, 2.0, None], [4, 5], 4),
        (9, [2.0, 1.0], [1, 2], 2),
        (1, [0.0, -1.0, math.inf], [2, 3], 2),
    ],
)
def test_the_last_and_the_best_are_kept(
    keep: int, scores: list[float | None], left: list[int], best: int | None, tmp_path: Path
) -> None:
    there = Checkpoints(tmp_path, keep)
    for step, score in enumerate(scores, 1):
        there.save(step, {}, {}, score)
    found = there.best()
    latest = there.latest()
    assert (there.steps(), found and found.step, latest and latest.step) == (left, best, len(scores))
    assert len(list(tmp_path.iterdir())) == len(left)


def test_steps_of_more_digits_are_the_later_ones(tmp_path: Path) -> None:
    there = Checkpoints(tmp_path)
    for step in (999_999_999, 1_000_000_000):
        there.save(step, {}, {})
    latest = there.latest()
    assert latest
    assert latest.step == 1_000_000_000
    emptied(there.folder / "step-1000000000" / "state.json")
    with pytest.raises(CheckpointError, match="step 999999999 before it is whole"):
        there.latest()


def test_keep_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="got keep=0, takes 1 or more"):
        Checkpoints(tmp_path, 0)


def test_what_others_put_there_is_neither_read_nor_deleted(kept: Checkpoints) -> None:
    for name in ("step-latest", "notes", "step-4", "step-000000009.zip"):
        (kept.folder / name).mkdir()
    kept.save(4, {}, {})
    kept.save(5, {}, {})
    assert kept.steps() == [3, 4, 5]
    assert all((kept.folder / name).is_dir() for name in ("step-latest", "notes", "step-4", "step-000000009.zip"))


def test_rewind_forgets_what_came_after(kept: Checkpoints) -> None:
    kept.rewind(2)
    assert kept.steps() == [1, 2]
    kept.save(3, {"model": tensors(33)}, {})
    assert same(kept.at(3).tensors("model"), tensors(33))


# -- damage -----------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # the last byte of a text is its newline


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def changed_state(path: Path) -> None:
    path.write_text(path.read_text().replace('"at": ', '"at": 1'))


def a_list(path: Path) -> None:
    path.write_text("[]")


def newer(path: Path) -> None:
    told = json.loads(path.read_text()) | {"version": 2}
    del told["sha256"]
    path.write_text(json.dumps(told | {"sha256": checkpoints._fingerprint(told)}))


HARM: list[tuple[str, Callable[[Path], None], str]] = [
    ("model.safetensors", truncated, "model.safetensors has .* bytes, not"),
    ("model.safetensors", emptied, "model.safetensors has 0 bytes, not"),
    ("model.safetensors", Path.unlink, "model.safetensors has 0 bytes, not"),
    ("model.safetensors", flipped, "model.safetensors changed since it was written"),
    ("state.json", truncated, "state.json cannot be read"),
    ("state.json", emptied, "state.json cannot be read"),
    ("state.json", Path.unlink, "state.json cannot be read"),
    ("state.json", changed_state, "state.json changed since it was written"),
    ("state.json", a_list, "state.json cannot be read"),
    ("state.json", newer, "it is of version 2, not 1"),
]


@pytest.mark.parametrize("name, harm, says", HARM)
def test_a_damaged_one_is_refused_by_name_with_the_step_to_go_back_to(
    name: str, harm: Callable[[Path], None], says: str, kept: Checkpoints
) -> None:
    harm(kept.folder / "step-000000003" / name)
    (kept.folder / "step-000000002" / "average.safetensors").write_bytes(b"")
    names = "step-000000003, which is damaged: .*" + says + ".*; step 1 before it is whole: delete this one"
    with pytest.raises(CheckpointError, match=names):
        kept.latest().tensors("model")  # type: ignore[union-attr]
    assert same(kept.at(1).tensors("model"), tensors(1))


@pytest.mark.parametrize("name, harm, says", HARM)
def test_where_none_before_it_is_whole_that_is_said(
    name: str, harm: Callable[[Path], None], says: str, kept: Checkpoints
) -> None:
    for step in (1, 2, 3):
        harm(kept.folder / f"step-{step:09d}" / name)
    with pytest.raises(CheckpointError, match="step-000000003, which is damaged: .*; no step before it is whole"):
        kept.at(3).tensors("model")


def test_one_under_another_steps_name_is_refused(kept: Checkpoints) -> None:
    (kept.folder / "step-000000003").rename(kept.folder / "step-000000004")
    with pytest.raises(
        CheckpointError, match="step-000000004, which is damaged: it was written as step 3; step 2 before"
    ):
        kept.latest()


def test_the_best_is_not_sought_past_a_damaged_one(kept: Checkpoints) -> None:
    kept.save(4, {}, {}, 1.0)
    truncated(kept.folder / "step-000000002" / "state.json")
    with pytest.raises(CheckpointError, match="step-000000002, which is damaged"):
        kept.best()


def test_a_run_goes_on_beside_a_damaged_one_and_leaves_it_where_it_is(kept: Checkpoints) -> None:
    truncated(kept.folder / "step-000000001" / "state.json")
    kept.save(4, {}, {})
    kept.save(5, {}, {})
    assert kept.steps() == [1, 3, 4, 5]


# -- writing that ends half-way ---------------------------------------------------------------------------------------


def run(code: str, folder: Path) -> str:
    status, told = fresh(f"import sys\n{code}", folder, folder=folder)
    assert not status, told
    return told


FULL = """
import resource, signal, torch
from pathlib import Path
from headway_apps.training.checkpoints import Checkpoints
from headway_apps.training.errors import CheckpointError
there = Checkpoints(Path(sys.argv[1]), keep=1)
there.save(1, {"model": {"x": torch.ones(10)}}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for files, state in (({"x": torch.ones(100_000)}, {}), ({}, {"x": "x" * 200_000})):
    try:
        there.save(2, {"model": files}, state)
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_is_one_clear_line_and_what_was_there_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: writes of tensors, and of the state, fail half-way."""
    told = run(FULL, tmp_path).splitlines()
    assert len(told) == 2
    for line in told:
        assert "cannot write" in line
        assert "File too large" in line
        assert "the other checkpoints are untouched" in line
    assert [each.name for each in tmp_path.iterdir()] == ["step-000000001"]
    assert Checkpoints(tmp_path).at(1).tensors("model")["x"].sum() == 10


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write .*step-000000001: Not a directory"):
        Checkpoints(tmp_path / "file").save(1, {}, {})


def test_all_is_on_the_disk_before_it_is_seen_and_seen_before_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Checkpoints(tmp_path, keep=1)
    there.save(1, {}, {})
    told: list[str] = []
    sync, rename, delete = os.fsync, Path.rename, shutil.rmtree
    name = lambda fd: Path(f"/proc/self/fd/{fd}").readlink().name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (told.append(f"sync {name(fd)}"), sync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (told.append(f"rename to {to.name}"), rename(self, to))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (told.append(f"delete {path.name}"), delete(path, **how)))
    there.save(2, {"model": tensors()}, {})
    plain = [each.split(".step-")[0] if each.endswith(".partial") else each for each in told]
    assert sorted(plain[:3]) == ["sync ", "sync model.safetensors", "sync state.json"]
    assert plain[2:] == [
        "sync ", "rename to step-000000002", f"sync {tmp_path.name}", "delete ", "rename to ", "delete ",
    ]  # fmt: skip


def test_a_deletion_that_stops_half_way_is_of_one_no_longer_seen(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(path: Path, **how: Any) -> None:
        if how:
            return
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stops)
        with pytest.raises(KeyboardInterrupt):
            kept.save(4, {}, {})
    assert kept.steps() == [2, 3, 4]
    assert folders.unfinished(kept.folder)
    kept.save(5, {}, {})
    assert not folders.unfinished(kept.folder)


KILLED = """
import os, random, signal, time, torch
from pathlib import Path
from headway_apps.training.checkpoints import Checkpoints
torch.set_num_threads(1)
there = Checkpoints(Path(sys.argv[1]), keep=2)

def files(step):
    return {name: {"x": torch.full((5000,), step), "y": torch.tensor(len(name))} for name in ("model", "average")}

def forever():
    latest = there.latest()
    step = latest.step if latest else 0
    while True:
        step += 1
        there.save(step, files(step), {"step": step}, score=float(-step % 7))

unfinished = 0
for _ in range(50):
    before = max(there.steps(), default=0)
    child = os.fork()
    if not child:
        forever()
    while max(there.steps(), default=0) == before:  # it is at work
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    unfinished += any(Path(sys.argv[1]).glob(".*.partial"))
    for step in there.steps():
        found = there.at(step)
        assert (found.state, found.score) == ({"step": step}, float(-step % 7))
        for name, tensors in files(step).items():
            assert all(torch.equal(tensors[key], x) for key, x in found.tensors(name).items())
there.save(step + 1, {}, {})
assert len(there.steps()) <= 3 and not list(there.folder.glob(".*")), list(there.folder.iterdir())
print(unfinished)
"""


def test_killed_at_fifty_random_moments_every_checkpoint_is_whole(tmp_path: Path) -> None:
    assert int(run(KILLED, tmp_path)) > 5  # or it was never killed while it wrote
