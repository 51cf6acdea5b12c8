"""New proteins as a FASTA file, whose headers say how each was made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from headway_apps.proteins.data import fasta
from headway_apps.proteins.errors import DataError
from headway_apps.training import folders


def check(path: Path, *, force: bool = False) -> None:
    """Raise where no file can be written: better before the work than after it."""
    if path.exists() and not path.is_file():
        raise DataError(f"got {path}, which is no file, takes the name of one; give another")
    if path.exists() and not force:
        raise DataError(f"got {path}, which is there already, takes a new file; give another name, or --force")
    if not path.absolute().parent.is_dir():
        raise DataError(f"got {path}, takes a file in a folder that is there; make {path.parent}")


def save(
    path: Path, proteins: Sequence[str], *, seed: int, sampler: str, templates: Sequence[str] = (), force: bool = False
) -> None:
    """Whole, or not at all. `templates` are the names of those that the proteins were made of, if they have any.

    >>> save(getfixture("tmp_path") / "new.fasta", ["MKT"], seed=7, sampler="first-hitting")
    >>> (getfixture("tmp_path") / "new.fasta").read_text()
    '>seed7-1 length=3 sampler=first-hitting\\nMKT\\n'
    """
    check(path, force=force)
    try:
        with folders.replacing(path) as partial:
            fasta.write(partial, _records(proteins, seed, sampler, templates))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; nothing was kept") from error


def _records(proteins: Sequence[str], seed: int, sampler: str, templates: Sequence[str]) -> Iterator[fasta.Record]:
    for number, (protein, template) in enumerate(zip_longest(proteins, templates, fillvalue=""), 1):
        told = f"length={len(protein)} sampler={sampler}" + (f" template={template}" if template else "")
        yield fasta.Record(f"seed{seed}-{number}", protein, told)
