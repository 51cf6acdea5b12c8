"""A folder of prepared sequences: Arrow files, and a manifest that says what they are and where they come from.

The manifest is written last, and the folder gets its name when all is in it: what can be opened is whole. Sequences are
kept as letters, not as tokens, so one folder serves every alphabet.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headway_apps.proteins.alphabet import Alphabet
from headway_apps.proteins.data.fasta import Record
from headway_apps.proteins.errors import DataError
from headway_apps.training import folders

MANIFEST = "manifest.json"
VERSION = 1
ROWS = 4096
"""Sequences in one block of a file: all that a writer holds in memory."""
SHARD_RESIDUES = 1 << 26

_SCHEMA = pa.schema([("name", pa.string()), ("description", pa.string()), ("sequence", pa.string())])


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which appears under its name once it is whole, or not at all.

    What a killed process had begun stays beside it, as `.NAME.*.partial`, and can be deleted.
    """
    folder = folder.absolute()
    if folder.exists():
        raise DataError(f"got {folder}, which is there already, takes a new folder; delete it, or give another name")
    try:
        with folders.appearing(folder) as partial:
            yield partial
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; nothing was kept") from error


@dataclass
class Writer:
    """One part of a folder, in as many files as it takes."""

    folder: Path
    part: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    letters: Counter[str] = field(default_factory=Counter)
    _rows: list[Record] = field(default_factory=list)
    _file: Any = None
    _residues: int = 0
    _sequences: int = 0

    def add(self, record: Record) -> None:
        self._rows.append(record)
        if len(self._rows) == ROWS:
            self._flush()
            if self._residues >= SHARD_RESIDUES:
                self._close()

    def _name(self) -> str:
        return f"{self.part}-{len(self.shards):05d}.arrow"

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            self._file = pa.ipc.new_file(str(self.folder / self._name()), _SCHEMA)
        columns = [pa.array([getattr(row, name) for row in self._rows], pa.string()) for name in _SCHEMA.names]
        self._file.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        text = "".join(row.sequence for row in self._rows)
        self.letters.update(text)
        self._residues += len(text)
        self._sequences += len(self._rows)
        self._rows.clear()

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        path = self.folder / self._name()
        self.shards.append(
            {"file": path.name, "bytes": path.stat().st_size, "sha256": folders.sha256(path),
             "sequences": self._sequences, "residues": self._residues}
        )  # fmt: skip
        self._file, self._residues, self._sequences = None, 0, 0

    def finish(self) -> dict[str, Any]:
        """All that the manifest says of this part."""
        self._flush()
        self._close()
        return {
            "sequences": sum(each["sequences"] for each in self.shards),
            "residues": sum(each["residues"] for each in self.shards),
            "letters": dict(sorted(self.letters.items())),
            "shards": self.shards,
        }


def write_manifest(folder: Path, parts: dict[str, dict[str, Any]], provenance: dict[str, Any]) -> None:
    """The last file of a folder, with a fingerprint of every sequence in it and of its place."""
    content = {"version": VERSION, "fingerprint": _fingerprint(parts), "parts": parts, "provenance": provenance}
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def _fingerprint(parts: dict[str, dict[str, Any]]) -> str:
    told = {name: [each["sha256"] for each in part["shards"]] for name, part in parts.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class Prepared:
    """A prepared folder, opened: its parts, its manifest, its provenance."""

    def __init__(self, folder: Path, verify: bool = True) -> None:
        """Sizes and ends of all files are looked at; `verify` also reads them once, to compare their hashes."""
        self.folder = folder
        self.manifest = _manifest(folder)
        self.provenance: dict[str, Any] = self.manifest["provenance"]
        self.fingerprint: str = self.manifest["fingerprint"]
        if verify:
            for shard in (each for part in self.manifest["parts"].values() for each in part["shards"]):
                if folders.sha256(_whole(folder, shard)) != shard["sha256"]:
                    raise DataError(
                        f"got {folder / shard['file']}, which changed since it was written; prepare it again"
                    )

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.manifest["parts"])

    def __getitem__(self, part: str) -> Part:
        if part not in self.manifest["parts"]:
            raise DataError(f"got the part {part!r}, takes one of {', '.join(self.parts)} in {self.folder}")
        return Part(self.folder, part, self.manifest["parts"][part], self.fingerprint)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, fingerprint = found["version"], found["fingerprint"]
        if version == VERSION and fingerprint == _fingerprint(found["parts"]):
            return cast("dict[str, Any]", found)
    except FileNotFoundError as error:
        where = "" if folder.is_absolute() else f" (in {Path.cwd()})"
        what = f"has no {MANIFEST}" if folder.is_dir() else f"is not there{where}"
        raise DataError(f"got {folder}, which {what}, takes a folder made by `prepare`") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"got {path}, which is damaged ({error}); prepare the folder again") from error
    raise DataError(
        f"got {path}, of version {version} with fingerprint {str(fingerprint)[:12]}, takes version {VERSION} with the "
        "fingerprint of its files; prepare the folder again"
    )


def _whole(folder: Path, shard: dict[str, Any]) -> Path:
    path: Path = folder / shard["file"]
    if not path.is_file():
        raise DataError(f"got {folder} without its {shard['file']}, takes all of a prepared folder; prepare it again")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise DataError(f"got {path} with {size:,} bytes, takes {shard['bytes']:,}; it is truncated: prepare it again")
    return path


class Part:
    """The sequences of one part, mapped into memory from disk, by place."""

    def __init__(self, folder: Path, name: str, told: dict[str, Any], fingerprint: str) -> None:
        self.name = name
        self.fingerprint = f"{fingerprint}/{name}"
        self.residues: int = told["residues"]
        self.letters: dict[str, int] = told["letters"]
        """How often each letter occurs."""
        self._blocks = [block for shard in told["shards"] for block in _blocks(folder, shard)]
        self._views = [_buffers(block) for block in self._blocks]
        self._starts: list[int] = [0, *accumulate(block.num_rows for block in self._blocks)]
        if len(self) != told["sequences"]:
            raise DataError(f"got {len(self):,} sequences in {folder}, takes {told['sequences']:,}; prepare it again")

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Record]:
        """One block's worth is in memory at a time."""
        for block in self._blocks:
            for name, description, sequence in zip(*(column.to_pylist() for column in block.columns), strict=True):
                yield Record(name, sequence, description)

    def __getitem__(self, at: int) -> Record:
        block, row = self._place(at)
        return _record(self._blocks[block], row)

    def letters_of(self, at: int) -> NDArray[np.uint8]:
        """The sequence as bytes of ASCII, without a copy."""
        block, row = self._place(at)
        ends, text = self._views[block]
        return text[ends[row] : ends[row + 1]]

    def lengths(self) -> NDArray[np.int64]:
        """Residues of each sequence."""
        found = [np.diff(ends) for ends, _ in self._views]
        return np.concatenate([np.empty(0, dtype=np.int64), *found]).astype(np.int64)

    def fits(self, alphabet: Alphabet) -> None:
        """Raise where the alphabet lacks a letter that occurs here."""
        if missing := set(self.letters) - set(alphabet.letters):
            found = ", ".join(f"{self.letters[each]:,} {each}" for each in sorted(missing))
            raise DataError(
                f"got {found} in {self.name}, takes the letters {alphabet.letters} of {alphabet.name}; prepare it with "
                "ambiguous=0, or use an alphabet that has them"
            )

    def _place(self, at: int) -> tuple[int, int]:
        if not 0 <= at < len(self):
            raise IndexError(f"got sequence {at} of {self.name}, takes 0 to {len(self) - 1}")
        block = bisect_right(self._starts, at) - 1
        return block, at - self._starts[block]


def _blocks(folder: Path, shard: dict[str, Any]) -> list[Any]:
    path = _whole(folder, shard)
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"got {path}, which is no Arrow file ({error}); prepare it again") from error
    if file.schema != _SCHEMA:
        raise DataError(f"got {path} with {file.schema.names}, takes {_SCHEMA.names}; prepare it again")
    return [file.get_batch(at) for at in range(file.num_record_batches)]


def _record(block: Any, at: int) -> Record:
    name, description, sequence = (block.column(each)[at].as_py() for each in _SCHEMA.names)
    return Record(name, sequence, description)


def _buffers(block: Any) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    _, ends, text = block.column(2).buffers()
    return np.frombuffer(ends, dtype=np.int32, count=block.num_rows + 1), np.frombuffer(text, dtype=np.uint8)
