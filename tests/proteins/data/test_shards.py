"""What can be opened is whole, is what was written, and says where it came from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from forked import fresh
from proteins.families import prepared, protein, records

from headway_apps.proteins.alphabet import ESM, SEED
from headway_apps.proteins.data import shards
from headway_apps.proteins.data.fasta import Record
from headway_apps.proteins.data.shards import Part, Prepared, Writer, appearing, write_manifest
from headway_apps.proteins.errors import DataError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    rng = np.random.default_rng(0)
    return [protein(rng, int(length)) for length in rng.integers(0, 80, 1000)]


@pytest.fixture(scope="module")
def whole(sequences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "folder", sequences).folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "folder"))


def shard(folder: Path) -> Path:
    return folder / "train-00000.arrow"


@pytest.fixture(params=[None, 7], ids=["one block", "many blocks and files"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, sequences: list[str], tmp_path: Path) -> Part:
    if request.param:
        monkeypatch.setattr(shards, "ROWS", request.param)
        monkeypatch.setattr(shards, "SHARD_RESIDUES", 3000)
    part = prepared(tmp_path / "folder", sequences)["train"]
    assert (len(list((tmp_path / "folder").glob("*.arrow"))) > 5) == bool(request.param)
    return part


def test_gives_back_what_was_written_from_either_end(part: Part, sequences: list[str]) -> None:
    assert list(part) == records(sequences)
    assert [part[at] for at in range(len(part))] == records(sequences)
    assert [part.letters_of(at).tobytes().decode() for at in reversed(range(len(part)))] == sequences[::-1]


def test_lengths_letters_and_residues_are_exact(part: Part, sequences: list[str]) -> None:
    assert len(part) == len(sequences)
    assert part.lengths().tolist() == [len(each) for each in sequences]
    assert part.residues == sum(map(len, sequences))
    assert part.letters == Counter("".join(sequences))


@pytest.mark.parametrize("at", [-1, 1000])
def test_a_place_outside_raises(at: int, whole: Path) -> None:
    with pytest.raises(IndexError, match="takes 0 to 999"):
        Prepared(whole)["train"].letters_of(at)


def test_an_unknown_part_is_named_with_those_that_are(whole: Path) -> None:
    with pytest.raises(DataError, match="got the part 'test', takes one of train"):
        Prepared(whole)["test"]


def test_letters_that_an_alphabet_lacks_are_named(tmp_path: Path) -> None:
    part = prepared(tmp_path / "x", ["MKXU", "MKX"])["train"]
    part.fits(ESM)
    with pytest.raises(DataError, match="got 1 U, 2 X in train"):
        part.fits(SEED)


def test_the_fingerprint_is_of_what_is_in_it(sequences: list[str], whole: Path, tmp_path: Path) -> None:
    assert prepared(tmp_path / "same", sequences).fingerprint == Prepared(whole).fingerprint
    for name, other in (("less", sequences[:-1]), ("turned", sequences[::-1])):
        assert prepared(tmp_path / name, other).fingerprint != Prepared(whole).fingerprint


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("cut", [1, 8, 1000], ids=lambda cut: f"{cut} bytes less")
def test_a_truncated_shard_is_refused(cut: int, verify: bool, folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"train-00000\.arrow with .* bytes, takes .*; it is truncated"):
        Prepared(folder, verify)["train"]


def test_a_changed_byte_is_refused(folder: Path) -> None:
    damaged = bytearray(shard(folder).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard(folder).write_bytes(damaged)
    with pytest.raises(DataError, match=r"train-00000\.arrow, which changed since it was written"):
        Prepared(folder)


def missing(folder: Path) -> None:
    shard(folder).unlink()


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def broken_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-50])


def list_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def newer(folder: Path) -> None:
    told = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(told | {"version": 2}))


def other_fingerprint(folder: Path) -> None:
    told = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(told | {"fingerprint": "0" * 64}))


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "harm, says",
    [
        (missing, r"without its train-00000\.arrow, takes all"),
        (no_manifest, "has no manifest.json, takes a folder made by `prepare`"),
        (broken_manifest, "which is damaged"),
        (list_manifest, "which is damaged"),
        (newer, "of version 2 .* takes version 1"),
        (other_fingerprint, "fingerprint 000000000000, takes"),
        (gone, r"which is not there, takes a folder"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(harm: Callable[[Path], None], says: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(DataError, match=says):
        Prepared(folder)


def replaced(folder: Path, content: Callable[[Path], object]) -> None:
    """Another file in a shard's place, of which the manifest tells the truth."""
    content(shard(folder))
    told = json.loads((folder / "manifest.json").read_text())
    told["parts"]["train"]["shards"][0]["bytes"] = shard(folder).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(told))


def other_table(path: Path) -> None:
    with pa.ipc.new_file(str(path), pa.schema([("x", pa.int64())])):
        pass


@pytest.mark.parametrize(
    "content, says",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "is no Arrow file"),
        (other_table, r"with \['x'\], takes \['name', 'description', 'sequence'\]"),
        (lambda path: shutil.copy(path.parents[1] / "fewer" / path.name, path), "got 10 sequences .* takes 1,000"),
    ],
    ids=["no end", "other columns", "other sequences"],
)
def test_a_file_that_is_not_what_was_prepared_is_refused(
    content: Callable[[Path], object], says: str, folder: Path, sequences: list[str], tmp_path: Path
) -> None:
    prepared(tmp_path / "fewer", sequences[:10])
    replaced(folder, content)
    with pytest.raises(DataError, match=says):
        Prepared(folder, verify=False)["train"]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def stops(partial: Path) -> None:
        (partial / "file").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "a" / "folder") as partial:
        stops(partial)
    assert list((tmp_path / "a").iterdir()) == []


def test_what_is_there_is_not_written_over(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="which is there already, takes a new folder"):
        prepared(folder, ["MKT"])
    assert (folder / "manifest.json").read_bytes() == before


def test_what_appeared_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    says = pytest.raises(DataError, match="cannot write .*folder: Directory not empty; nothing was kept")
    with says, appearing(tmp_path / "folder") as partial:
        (Path(shutil.copytree(partial, tmp_path / "folder")) / "theirs").write_text("x")
    assert [each.name for each in tmp_path.rglob("*")] == ["folder", "theirs"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write .*: Not a directory; nothing was kept"):
        prepared(tmp_path / "file" / "folder", ["MKT"])


def run(code: str, *given: str) -> subprocess.Popen[str]:
    path = f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}, {str(ROOT / 'tests')!r}]\n"
    return subprocess.Popen([sys.executable, "-c", path + code, *given], stdout=subprocess.PIPE, text=True)


FULL = """
import resource, signal, sys
from pathlib import Path
import headway_apps.proteins.data.shards as shards
from headway_apps.proteins.errors import DataError
from proteins.families import prepared
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    prepared(Path(sys.argv[1]), ["MKTAYIAKQR" * 10] * 5000)
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_one_clear_line_and_nothing_is_kept(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: writes fail half-way."""
    status, told = fresh(FULL, tmp_path / "folder", folder=tmp_path)
    assert status == 0, told
    assert "cannot write" in told
    assert "nothing was kept" in told
    assert list(tmp_path.iterdir()) == []


FOREVER = """
import itertools, shutil
from pathlib import Path
import headway_apps.proteins.data.shards as shards
from proteins.families import prepared
folder = Path(sys.argv[1])
shards.ROWS, shards.SHARD_RESIDUES = 16, 2000
for number in itertools.count():
    prepared(folder / str(number), ["MKTAYIAKQR" * 10] * 200)
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_folders_only(tmp_path: Path) -> None:
    writer = run(FOREVER, str(tmp_path))
    assert writer.stdout is not None
    rng = np.random.default_rng()
    for _ in range(int(rng.integers(1, 20))):
        writer.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(rng.random() * 0.02)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate(timeout=10)
    there = [each for each in tmp_path.iterdir() if not each.name.startswith(".")]
    assert there
    for each in there:
        assert len(Prepared(each)["train"]) == 200


def test_memory_does_not_grow_with_what_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS", 64)
    peaks = {}
    for count in (500, 4_000):
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        with appearing(tmp_path / str(count)) as partial:
            writer = Writer(partial, "train")
            for at in range(count):
                writer.add(Record(f"P{at}", "MKTAYIAKQR" * 40))
            write_manifest(partial, {"train": writer.finish()}, {})
        assert sum(len(each.sequence) for each in Prepared(tmp_path / str(count))["train"]) == 400 * count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 1 << 20
    grown = 400 * (4_000 - 500)
    assert peaks[4_000] - peaks[500] < grown / 4  # what is known of each block of 64, not its letters


def test_reading_maps_files_and_copies_nothing(whole: Path) -> None:
    part = Prepared(whole)["train"]
    before = pa.total_allocated_bytes()
    letters = [part.letters_of(at) for at in range(len(part))]
    assert not any(each.flags.owndata or each.flags.writeable for each in letters)
    assert pa.total_allocated_bytes() == before
