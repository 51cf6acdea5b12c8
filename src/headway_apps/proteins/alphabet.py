"""Which token stands for which letter of a protein: the alphabets of ESM and of the first protein SEDD."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from headway_apps.proteins.errors import DataError

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
"""The twenty amino acids."""

AMBIGUOUS = "BOUXZ"
"""Letters that databases write for what is not known exactly (B, X, Z) or is rare (O, U)."""


@dataclass(frozen=True)
class Alphabet:
    """A token's id is its place among the symbols.

    >>> ESM.encode("MKT")
    [0, 20, 15, 11, 2]
    >>> ESM.decode([0, 20, 15, 11, 2])
    'MKT'
    """

    name: str
    symbols: tuple[str, ...]
    begin: int
    end: int
    pad: int
    unknown: int
    mask: int

    def __post_init__(self) -> None:
        if len(set(self.symbols)) != self.size:
            raise DataError(f"got an alphabet {self.name!r} with a symbol twice, takes each once; remove one")
        specials = (self.begin, self.end, self.pad, self.unknown, self.mask)
        if len(set(specials)) != 5 or not all(0 <= each < self.size for each in specials):
            raise DataError(
                f"got special tokens {specials} in an alphabet of {self.size} symbols, takes five different ids below "
                f"{self.size}; give each its own"
            )
        if missing := set(STANDARD) - set(self.symbols):
            raise DataError(f"got an alphabet {self.name!r} without {', '.join(sorted(missing))}; add what is missing")

    @property
    def size(self) -> int:
        return len(self.symbols)

    @cached_property
    def residues(self) -> tuple[int, ...]:
        """Ids of the twenty amino acids: what a new protein may hold."""
        return tuple(self._ids[letter] for letter in STANDARD)

    @cached_property
    def ambiguous(self) -> tuple[int, ...]:
        """Ids of letters that a sequence of a database may hold too."""
        return tuple(self._ids[letter] for letter in AMBIGUOUS if letter in self._ids)

    @cached_property
    def letters(self) -> str:
        """All that `encode` takes."""
        return "".join(self.symbols[each] for each in self.residues + self.ambiguous)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: each for each, symbol in enumerate(self.symbols)}

    @cached_property
    def _proteins(self) -> frozenset[int]:
        return frozenset(self.residues + self.ambiguous)

    def id_of(self, symbol: str) -> int:
        """Of any symbol, special ones too."""
        if symbol not in self._ids:
            raise DataError(f"got the symbol {symbol!r}, takes those of {self.name}: {' '.join(self.symbols)}")
        return self._ids[symbol]

    def encode(self, sequence: str) -> list[int]:
        """Ids of the letters, between the tokens that begin and end a protein."""
        self.check(sequence)
        return [self.begin, *(self._ids[letter] for letter in sequence), self.end]

    def check(self, letters: Iterable[str]) -> None:
        """Raise where one of these letters is none of a protein in this alphabet."""
        for at, letter in enumerate(letters):
            if letter not in self.letters:
                raise DataError(
                    f"got {letter!r} at position {at}, takes the letters {self.letters} of {self.name}; clean the "
                    "sequence, or use an alphabet that has it"
                )

    def decode(self, ids: Iterable[int]) -> str:
        """The protein between its boundary tokens, which may be absent; anything else that is no letter raises."""
        inner = self._inside(list(ids))
        for at, each in enumerate(inner):
            if each not in self._proteins:
                shown = self.symbols[each] if 0 <= each < self.size else f"no symbol of {self.name}"
                raise DataError(f"got token {each} ({shown}) inside a sequence at position {at}, takes letters only")
        return "".join(self.symbols[each] for each in inner)

    def is_protein(self, ids: Iterable[int]) -> bool:
        """Whether there is at least one letter between the boundary tokens, and nothing else: no mask, no padding."""
        inner = self._inside(list(ids))
        return bool(inner) and all(each in self._proteins for each in inner)

    def _inside(self, ids: list[int]) -> list[int]:
        first = 1 if ids and ids[0] == self.begin else 0
        last = len(ids) - 1 if len(ids) > first and ids[-1] == self.end else len(ids)
        return ids[first:last]


ESM = Alphabet(
    name="esm",
    symbols=(
        "<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWC", *"XBUZO.-", "<null_1>", "<mask>",
    ),
    begin=0, end=2, pad=1, unknown=3, mask=32,
)  # fmt: skip
"""The 33 symbols of ESM. Its mask is the last, as absorbing diffusion over 32 tokens wants it."""

SEED = Alphabet(
    name="seed",
    symbols=("<s>", "<pad>", "</s>", "<unk>", "<mask>", *STANDARD),
    begin=0, end=2, pad=1, unknown=3, mask=4,
)  # fmt: skip
"""The 25 symbols that the first protein SEDD wrote beside `processed_uniref50.pt`."""

ALPHABETS = {each.name: each for each in (ESM, SEED)}


def raised(letters: str) -> str:
    """In upper case where all are ASCII: what is foreign stays foreign, and "ß" would become two good letters."""
    return letters.upper() if letters.isascii() else letters
