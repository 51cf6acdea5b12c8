"""Templates: which residues of a new protein are given, and which are free, to be drawn around them.

MKTAYI____GG     a letter is given; `_` is one free residue
MKT_120VLLA      `_120` is a hundred and twenty of them
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from headway import RequestError
from headway_apps.proteins.alphabet import STANDARD, Alphabet, raised
from headway_apps.proteins.data import fasta
from headway_apps.proteins.errors import DataError
from headway_apps.proteins.generate.lengths import LONGEST

FREE = "_"
_PIECE = re.compile(rf"(?P<given>[{STANDARD}]+)|{FREE}(?P<count>[0-9]*)")


@dataclasses.dataclass(frozen=True)
class Template:
    """A protein to fill in, with at least one free residue.

    >>> Template.parse("MK_3G").sites
    'MK___G'
    """

    sites: str
    """A letter where a residue is given, and `_` where it is free."""
    name: str = ""

    def __post_init__(self) -> None:
        if foreign := set(self.sites) - set(STANDARD + FREE):
            raise RequestError(f"got {', '.join(sorted(foreign))} in a template, takes {STANDARD} and {FREE}")
        if not self.free or len(self.sites) > LONGEST:
            raise RequestError(
                f"got a template of {len(self.sites):,} residues of which {self.free:,} are free, takes 1 free or more "
                f"and {LONGEST:,} in all at most: write {FREE} for a residue to draw"
            )

    @classmethod
    def of_length(cls, length: int) -> Template:
        """With nothing given."""
        return cls(FREE * min(length, LONGEST + 1))

    @classmethod
    def parse(cls, text: str, name: str = "") -> Template:
        letters = raised(text)
        pieces, at = [], 0
        while at < len(text):
            piece = _PIECE.match(letters, at)
            if piece is None:
                raise RequestError(
                    f"got {text[at]!r} as character {at + 1} of a template, takes the residues {STANDARD}, {FREE} for "
                    f"a free one and {FREE}12 for twelve"
                )
            pieces.append(piece["given"] or FREE * min(int(piece["count"] or 1), LONGEST + 1))
            at = piece.end()
        return cls("".join(pieces), name)

    @property
    def free(self) -> int:
        """How many residues are to be drawn."""
        return self.sites.count(FREE)

    def encode(self, alphabet: Alphabet) -> tuple[list[int], list[bool]]:
        """Token ids between those that begin and end a protein, any where a residue is free; and which are free."""
        ids = alphabet.encode(self.sites.replace(FREE, STANDARD[0]))
        return ids, [False, *(each == FREE for each in self.sites), False]

    def fits(self, protein: str) -> bool:
        """Whether a protein has all that is given, where it is given."""
        return len(protein) == len(self.sites) and all(
            site in (FREE, letter) for site, letter in zip(self.sites, protein, strict=True)
        )


def read(path: Path) -> list[Template]:
    """Those of a FASTA file, or of a list with one a line."""
    found = []
    for each in fasta.read(path):
        try:
            found.append(Template.parse("".join(each.sequence.split()), each.name))
        except RequestError as error:
            raise DataError(f"in {path}, {each.name}: {error}") from error
    if not found:
        raise DataError(f"got {path} without a template, takes one or more")
    return found
