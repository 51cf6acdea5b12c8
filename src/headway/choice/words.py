"""How a decision reads: facts first, then each distinct refusal once, with the backends it stops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headway.limits.limit import Refusal

WIDTH = 96
"""Names of backends that share a refusal are broken into lines of about this length."""


def in_words(
    facts: Sequence[tuple[str, str]],
    refused: Iterable[tuple[str, tuple[Refusal, ...]]],
    instead: Sequence[str] = (),
) -> list[str]:
    """Lines of a label and a text, the texts one below the other.

    >>> slow = Refusal("cuda 7.5", "cuda 8.0 or newer", "choose a backend for older GPUs", machine_wide=True)
    >>> odd = Refusal("head_dim 76", "multiples of 8", "pad to 80")
    >>> print("\\n".join(in_words([("machine", "T4")], [("flash2", (odd, slow)), ("flash4", (slow,))])))
      machine  T4
      flash2, flash4
               got cuda 7.5, takes cuda 8.0 or newer; choose a backend for older GPUs
      flash2   got head_dim 76, takes multiples of 8; pad to 80
    """
    groups = _grouped(refused)
    width = max((len(names[0]) for names, _ in groups), default=0)
    width = max(width, *(len(label) for label, _ in facts), 2)
    lines = [f"  {label:<{width}}  {text}" for label, text in facts]
    for names, refusal in groups:
        if len(names) == 1:
            lines.append(f"  {names[0]:<{width}}  {refusal}")
        else:
            lines += [*_listed(names), f"  {'':<{width}}  {refusal}"]
    return lines + [f"  {'or':<{width}}  {text}" for text in _instead(instead)]


def _grouped(refused: Iterable[tuple[str, tuple[Refusal, ...]]]) -> list[tuple[list[str], Refusal]]:
    """Each distinct refusal with all whom it stops; facts about the machine come first."""
    groups: dict[Refusal, list[str]] = {}
    for name, refusals in refused:
        for refusal in refusals:
            groups.setdefault(refusal, []).append(name)
    return sorted(((names, refusal) for refusal, names in groups.items()), key=lambda pair: not pair[1].machine_wide)


def _listed(names: Sequence[str]) -> list[str]:
    lines = [names[0]]
    for name in names[1:]:
        if len(lines[-1]) + len(name) > WIDTH:
            lines[-1] += ","
            lines.append(name)
        else:
            lines[-1] += f", {name}"
    return [f"  {line}" for line in lines]


def _instead(names: Sequence[str]) -> list[str]:
    """What takes the call as it is."""
    fast = [repr(name) for name in names if name != "reference"]
    found = [f"backend={' or '.join(fast)} takes the call as it is"] if fast else []
    if "reference" in names:
        found.append("backend='reference' takes every call, slowly")
    return found
