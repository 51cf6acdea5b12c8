"""A certificate read back and checked: its form, its verdict, whether it holds here, and its edge deck once more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import torch

from headway.choice.here import here
from headway.errors import CertificateError
from headway.swap.deck import Card, Shape, deal
from headway.swap.judge import Errors
from headway.swap.proof import FORMAT, NOTHING, Certificate, Proof, versions

LISTS = {"errors": Errors, "proofs": Proof, "deck": Card}
PARTS = {"shape": Shape, "whole": Proof}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What checking a certificate found."""

    certificate: Certificate
    differs: tuple[str, ...]
    """What is different here from where it was made."""
    deck: tuple[Card, ...]
    """The edge deck, dealt again on this machine."""

    @property
    def holds(self) -> bool:
        return self.certificate.passed and not any(card.failure for card in self.deck)

    def __str__(self) -> str:
        said = ("passed" if self.certificate.passed else "failed") if self.certificate.proofs else NOTHING
        lines = [f"certificate of {self.certificate.model}: {said}"]
        lines += [f"  differs: {each}" for each in self.differs]
        ran = [card for card in self.deck if card.backend]
        good = sum(not card.failure for card in ran)
        if self.deck:
            lines.append(f"  edge deck dealt again here: {good} of {len(ran)} calls right")
        lines += [f"  {card.case} on {card.backend}: {card.failure}" for card in ran if card.failure]
        return "\n".join(lines)


def verify(path: str | Path) -> Verdict:
    """Read a certificate, check that its verdict follows from its numbers, and deal its edge deck here."""
    certificate = read(path)
    device = certificate.facts["device"]
    if device == "cuda" and not torch.cuda.is_available():
        return Verdict(certificate, (f"it is of {certificate.facts['name']}; here is no CUDA device",), ())
    machine = here(torch.device(device))
    now = {"name": machine.name, "capability": machine.capability, **versions(machine)}
    then = {
        "name": certificate.facts["name"],
        "capability": certificate.facts["capability"],
        **certificate.facts["versions"],
    }
    differs = tuple(
        f"{what} {_word(then.get(what))} there, {_word(now.get(what))} here"
        for what in then | now
        if _word(then.get(what)) != _word(now.get(what))
    )
    return Verdict(certificate, differs, tuple(deal(card.shape for card in certificate.deck)))


def read(path: str | Path) -> Certificate:
    """The certificate in a file; CertificateError if it is none, or says what its numbers do not."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CertificateError(f"got {path}, which cannot be read as JSON ({error}); takes a certificate") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CertificateError(
            f"got {path} of another format, takes {FORMAT!r}; make it with swap.certificate.save(path)"
        )
    passed = data.pop("passed", None)
    del data["format"]
    certificate: Certificate = _made(Certificate, data, "certificate")
    if certificate.passed != passed:
        raise CertificateError(f"got a certificate that says passed={passed}, but its numbers say {certificate.passed}")
    return certificate


def _made(kind: Any, data: Any, where: str) -> Any:
    """A dataclass from its plain data; every field must be there, and nothing else."""
    fields = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(data, dict) or set(data) != set(fields):
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise CertificateError(f"got {where} with {got}, takes {sorted(fields)}")
    hints = get_type_hints(kind)
    return kind(**{name: _field(name, data[name], hints[name], f"{where}.{name}") for name in fields})


def _field(name: str, value: Any, hint: Any, where: str) -> Any:
    if name in LISTS:
        if not isinstance(value, list):
            raise CertificateError(f"got {where} of type {type(value).__name__}, takes a list")
        return tuple(_made(LISTS[name], each, f"{where}[{i}]") for i, each in enumerate(value))
    if name in PARTS:
        return None if value is None else _made(PARTS[name], value, where)
    if hint is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise CertificateError(f"got {where}={value!r}, takes a number") from None
    if name == "backends":
        return tuple(value)
    if not isinstance(value, hint if isinstance(hint, type) else dict):
        raise CertificateError(f"got {where}={value!r}, takes {hint}")
    return value


def _word(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
