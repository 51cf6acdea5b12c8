"""Sequences from FASTA files and plain lists, packed or not; every one that is refused is counted, with the reason.

The parser is our own: pyfastx takes a truncated .gz for the whole of it, and drops what would be counted here.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from headway import RequestError
from headway_apps.proteins.alphabet import AMBIGUOUS, STANDARD, raised
from headway_apps.proteins.errors import DataError

_UNIREF50 = re.compile(r"UniRef50_\S+$")
_NO_SEQUENCE = re.compile(rb"[\x00|,;:=#<>(){}\[\]\"'/\\]")
"""What a table, a header, markup or UTF-16 has in its first line, and a sequence or a template never."""
_NUCLEOTIDES = frozenset("ACGTUN")


@dataclass(frozen=True, slots=True)
class Record:
    """A sequence as a file has it, white space and all; the name is the first word of its header."""

    name: str
    sequence: str
    description: str = ""

    @property
    def family(self) -> str | None:
        """The cluster at 50 % identity that its header names; those of UniRef90 and 100 are too alike to be split."""
        return self.name if _UNIREF50.match(self.name) else None


def read(path: Path) -> Iterator[Record]:
    """Each sequence of a FASTA file, or of a list with one a line; gzip is known by its first bytes, not by the name.

    Holds one sequence at a time. What it cannot read to the end raises.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if packed else raw as lines:
                yield from _records(lines, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"got {path}, whose gzip data breaks off or is damaged ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _records(lines: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[Record]:
    header: str | None = None
    parts: list[str] = []
    kind = b""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if not kind:
            kind = line.strip()[:1]
            if kind == b"@":
                raise DataError(f"got {path}, which reads as FASTQ, takes FASTA or one sequence a line; convert it")
            if kind not in (b"", b">") and _NO_SEQUENCE.search(line):
                raise DataError(
                    f"got {path}, whose line {number} is neither a header of FASTA, which begins with >, nor a"
                    f" sequence: {_text(line).strip()[:40]!r}; takes FASTA, or a list with a sequence a line, in UTF-8"
                )
        if kind == b">" and line.startswith(b">"):
            if header is not None:
                yield _record(header, parts)
            header, parts = line[1:].decode(errors="replace").strip(), []
        elif header is not None:
            parts.append(_text(line))
        elif line.strip():
            yield Record(f"line{number}", _text(line))
    if header is not None:
        yield _record(header, parts)


def _record(header: str, parts: list[str]) -> Record:
    name, _, description = header.partition(" ")
    return Record(name, "".join(parts), description)


def _text(line: bytes) -> str:
    return line.removesuffix(b"\n").decode("ascii", errors="replace")  # what is foreign stays foreign, and is counted


def write(path: Path, records: Iterable[Record], width: int = 60) -> None:
    """A FASTA file, with at most `width` letters a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for each in records:
            file.write(f">{each.name} {each.description}".rstrip() + "\n")
            file.writelines(each.sequence[at : at + width] + "\n" for at in range(0, len(each.sequence), width))


@dataclass(frozen=True)
class Rules:
    """What a sequence must be to be taken."""

    shortest: int = 30
    longest: int = 510
    ambiguous: float = 0.0
    """The greatest share of B, O, U, X and Z."""
    duplicates: bool = False
    """Whether the same sequence is taken again. If not, 100 bytes or so of memory are kept for each sequence taken."""

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise RequestError(
                f"got lengths {self.shortest} to {self.longest}, takes 1 or more for the shortest and no less for the"
                " longest"
            )
        if not 0 <= self.ambiguous <= 1:
            raise RequestError(f"got a share of {self.ambiguous} ambiguous letters, takes 0 to 1")


@dataclass
class Counts:
    """What became of all records read: `read` = `taken` + all that were rejected."""

    read: int = 0
    taken: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    """Records that were changed before they were judged."""
    noted: Counter[str] = field(default_factory=Counter)
    """What is odd, but refuses nothing."""

    def told(self) -> dict[str, int | dict[str, int]]:
        """As plain values."""
        kinds = {"rejected": dict(self.rejected), "mended": dict(self.mended), "noted": dict(self.noted)}
        return {"read": self.read, "taken": self.taken, **kinds}

    def __str__(self) -> str:
        found = [f"{self.read:,} read", f"{self.taken:,} taken"]
        found += [f"{number:,} rejected: {why}" for why, number in self.rejected.most_common()]
        found += [f"{number:,} mended: {what}" for what, number in self.mended.most_common()]
        return "; ".join(found + [f"{number:,} noted: {what}" for what, number in self.noted.most_common()])


def clean(records: Iterable[Record], rules: Rules, counts: Counts) -> Iterator[Record]:
    """The records that the rules take, mended; `counts` tells of all others why."""
    sequences: set[bytes] = set()
    names: set[bytes] = set()
    for record in records:
        counts.read += 1
        sequence = _mend(record.sequence, counts.mended)
        why = _fault(sequence, rules)
        if why is None and not rules.duplicates and not _is_new(sequence, sequences):
            why = "duplicate sequence"
        if why is not None:
            counts.rejected[why] += 1
            continue
        counts.taken += 1
        if not rules.duplicates and not _is_new(record.name, names):
            counts.noted["duplicate name"] += 1
        yield Record(record.name, sequence, record.description)


def _mend(sequence: str, mended: Counter[str]) -> str:
    if not sequence.isascii():
        return sequence  # it is refused
    if "\r" in sequence:
        mended["carriage returns removed"] += 1
        sequence = sequence.replace("\r", "")
    if (dense := "".join(sequence.split())) != sequence:
        mended["white space removed"] += 1
    if dense.endswith("*"):
        mended["stop at the end removed"] += 1
        dense = dense[:-1]
    if (upper := raised(dense)) != dense:
        mended["lower case raised"] += 1
    return upper


def _fault(sequence: str, rules: Rules) -> str | None:
    if not sequence:
        return "empty"
    if foreign := set(sequence) - set(STANDARD + AMBIGUOUS + "J"):
        return "stop inside" if foreign == {"*"} else "gap inside" if foreign <= {"-", "."} else "not amino acids"
    # J (I or L) has no token in any alphabet here, so no share of it can be taken.
    if "J" in sequence or sum(sequence.count(each) for each in AMBIGUOUS) > rules.ambiguous * len(sequence):
        return "too many ambiguous letters"
    if len(sequence) < rules.shortest:
        return f"shorter than {rules.shortest}"
    if len(sequence) > rules.longest:
        return f"longer than {rules.longest}"
    return "nucleotides" if seems_nucleotides(sequence) else None


def seems_nucleotides(sequence: str) -> bool:
    """No protein of this length has none but these letters."""
    return len(sequence) >= 20 and _NUCLEOTIDES.issuperset(sequence)


def _is_new(text: str, seen: set[bytes]) -> bool:
    before = len(seen)
    seen.add(blake2b(text.encode(), digest_size=16).digest())
    return len(seen) > before
